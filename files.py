"""Files that appear whole or not at all, and what identifies their contents."""

import contextlib
import hashlib
import os


@contextlib.contextmanager
def replacing(path, before=lambda temporary: None):
    """
    A binary file that takes the place of path when the block ends well: complete or not at all, and on the disk. Just before
    it does, before() is called with the name that it has until then.
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
            os.unlink(temporary)  # what it holds may be what filled the disk
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def sha256(path):
    """Of the contents of the file at path, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
