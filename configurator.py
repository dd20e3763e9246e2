"""
Configurations: a dataclass of knobs, filled from TOML files and --key=value or --key value; the later one wins.

    cfg = parse(Config, sys.argv[1:])        # config/demo.toml --learning_rate=3e-4 --compile=False

The comment after a field is its help text. All that is wrong with a configuration is reported in one message.
"""

import dataclasses
import difflib
import inspect
import os
import re
import reprlib
import sys
import tomllib
import types
import typing

from guard import UserError

PathName = typing.NewType("PathName", str)  # the type of a knob that names a file or folder: ~ is the home folder


def parse(cls, arguments):
    """
    An instance of the dataclass cls, with `given`, the names of the knobs that stand on the command line. Raises UserError
    naming every unknown key, wrong type and refused value.
    """
    if "-h" in arguments or "--help" in arguments:
        print(help_text(cls))
        sys.exit(0)
    types_, values, problems, given = typing.get_type_hints(cls), {}, [], set()

    def assign(key, value, where):
        if key not in types_:
            near = difflib.get_close_matches(key, types_, n=1)
            problems.append(f"{where}: no knob is named {key[:60]!r}" + (f"; did you mean {near[0]}?" if near else ""))
            return
        try:
            values[key] = convert(value, types_[key])
        except (ValueError, OverflowError):
            problems.append(f"{where}: {key}={reprlib.repr(value)} is not {describe(types_[key])}")

    arguments = [*arguments]
    while arguments:
        argument = arguments.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and not equals:  # --key value, or a bare --compile
            follows = arguments and not arguments[0].startswith("--")
            if bare(types_.get(key)) is bool and not (follows and arguments[0].lower() in ("true", "false")):
                equals, value = "=", "True"
            elif follows:
                equals, value = "=", arguments.pop(0)
        if argument.startswith("--") and equals:
            assign(key, value, "command line")
            given.add(key)
        elif argument.endswith(".toml"):
            for key, value in read_toml(argument).items():
                assign(key, value, argument)
        elif argument.startswith("--") and key in types_:
            problems.append(f"command line: --{key} needs a value; one that begins with -- is given as --{key}=--...")
        else:
            problems.append(f"command line: {reprlib.repr(argument)} is neither a FILE.toml nor --key=value")
    try:
        config = cls(**values)
    except ValueError as error:
        problems += str(error).splitlines()
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise UserError("\n".join([problem[:600] for problem in problems[:20]] + more))
    config.given = given
    return config


def read_toml(path):
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, or nested beyond reason
        raise UserError(f"{path} is not valid TOML: {error}") from None


def bare(type_):
    """X of X | None, and any other type itself."""
    return typing.get_args(type_)[0] if typing.get_origin(type_) in (types.UnionType, typing.Union) else type_


def convert(value, type_):
    """value, a TOML value or a command line's text, as type_. Raises ValueError."""
    if bare(type_) is not type_:
        return None if value == "None" else convert(value, bare(type_))
    if type_ is PathName and isinstance(value, str):
        return os.path.expanduser(value)
    if typing.get_origin(type_) is typing.Literal:  # a choice of names, which the dataclass itself checks
        type_ = str
    if isinstance(value, str) and type_ is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, str) and type_ in (int, float):
        return type_(value)
    if type_ is float and type(value) is int:
        return float(value)
    if type(value) is not type_:
        raise ValueError
    return value


def describe(type_):
    if bare(type_) is not type_:
        return f"{describe(bare(type_))} or None"
    return {int: "a whole number", float: "a number", bool: "True or False"}.get(type_, "text")


def help_text(cls):
    """The module's docstring, then a line for each knob: name, default, meaning and, of a choice, its values."""
    lines = [inspect.getdoc(sys.modules[cls.__module__]), "", "knobs (--name=value or --name value):"]
    meanings = {}
    for base in reversed(cls.__mro__[:-1]):
        meanings |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), re.MULTILINE))
    for field in dataclasses.fields(cls):
        kind = bare(typing.get_type_hints(cls)[field.name])
        names = ", ".join(name or '""' for name in typing.get_args(kind))
        lines.append(f"  {field.name + '=' + str(field.default):34} {meanings[field.name]}{names and f' ({names})'}")
    return "\n".join(lines)
