"""Files that appear whole or not at all, what identifies their contents, and folders that one process holds alone."""

import contextlib
import errno
import fcntl
import hashlib
import os
import sys
import time

from guard import UserError


@contextlib.contextmanager
def replacing(path, before=lambda temporary: None):
    """
    A binary file that takes the place of path when the block ends well: complete or not at all, and on the disk. Just before
    that, it calls before() with the file's temporary name.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        before(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # its contents may have filled the disk
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def sha256(path):
    """The SHA-256 of the file at path: 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock(path, remedy):
    """
    Lock a folder or a file for this process while the block runs; the system unlocks it when the process ends, however it
    ends. Raises UserError, with the remedy, if another process holds it.
    """
    with open(os.path.join(path, "lock") if os.path.isdir(path) else f"{path}.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{path} is in use by {file.read() or 'another process'}: {remedy}") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            print(f"{path}: this file system has no locks, so keep other runs out of it yourself", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield
