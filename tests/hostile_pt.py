"""Files of torch.save that lie, that are programs, or that explode."""

import argparse
import copy
import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nano_files import SIZES, nano_state


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('the file ran its own code')",))


def archive(path: Path, program: bytes, files: dict[str, bytes] | None = None, *, compress: bool = False) -> Path:
    """A zip like torch.save's, around any pickle."""
    how = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", how) as out:
        out.writestr("archive/data.pkl", program)
        for name, content in (files or {}).items():
            out.writestr(f"archive/{name}", content)
    return path


def saved(content: Any) -> bytes:
    """A file of torch.save."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def pickled(content: bytes) -> bytes:
    """A file around opcodes."""
    return b"\x80\x02" + content + b"."


def a_tensor(*, dtype: str = "FloatStorage", numel: int = 4, offset: int = 0, size: Any = (4,), stride: Any = (1,)):
    """Opcodes that rebuild one tensor of storage 0."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.description if isinstance(obj, Storage) else None

    class Call:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, OrderedDict())

    storage: Any = Storage()
    storage.description = ("storage", getattr(torch, dtype), "0", "cpu", numel)
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"w": Call()})
    return buffer.getvalue()


FLOATS = {"data/0": np.arange(4, dtype=np.float32).tobytes()}


LIES: dict[str, tuple[bytes, dict[str, bytes], str]] = {
    "more numbers than the file has": (a_tensor(numel=2**40, size=(2**40,)), FLOATS, "has 16 bytes, for 1,099,511"),
    "a view past the storage": (a_tensor(size=(5,)), FLOATS, r"size \[5\] in a storage of 4 numbers"),
    "an offset past the storage": (a_tensor(offset=1), FLOATS, r"size \[4\] in a storage of 4 numbers"),
    "a stride past the storage": (a_tensor(stride=(2,)), FLOATS, r"size \[4\] in a storage of 4 numbers"),
    "a stride of zero, repeated": (a_tensor(size=(9,), stride=(0,)), FLOATS, r"size \[9\] in a storage of 4"),
    "a negative stride": (a_tensor(stride=(-1,)), FLOATS, "offset, size and stride"),
    "a negative offset": (a_tensor(offset=-1), FLOATS, "offset, size and stride"),
    "a size that is text": (a_tensor(size=("4",)), FLOATS, "offset, size and stride"),
    "sizes without strides": (a_tensor(size=(2, 2)), FLOATS, "2 sizes and 1 strides"),
    "thirty sizes": (a_tensor(size=(1,) * 30, stride=(1,) * 30), FLOATS, "30 sizes and 30 strides"),
    "a tensor that is not there": (a_tensor(), {}, r"lacks data/0, which a tensor needs"),
    "another dtype": (a_tensor(dtype="DoubleStorage"), FLOATS, "has 16 bytes, for 4 numbers of float64"),
    "big-endian numbers": (a_tensor(), FLOATS | {"byteorder": b"big"}, "holds big-endian numbers"),
}


def shared_tuples(levels: int) -> bytes:
    """A tuple of two that are one, and so on: small, but 2^levels values long where it is hashed or written out."""
    steps = b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(levels))
    return b"}" + b")q\x00" + steps + b"N}h%cNs" % levels


def copies(name: bytes, items: int = 30_000, times: int = 30_000) -> bytes:
    """A long list, and a function that copies it again and again."""
    return name + b"q\x00]q\x01(" + b"N" * items + b"e" + b"h\x00h\x01\x85R" * times


BOMBS: dict[str, tuple[bytes, str]] = {
    "code": (saved({"model": Evil()}), r"needs arbitrary code to load \((__builtin__|builtins)\.exec\); refused"),
    "a function of os": (saved({"x": Path("a")}), r"needs arbitrary code to load \(pathlib\._local|\(pathlib\."),
    "a Namespace": (saved({"args": argparse.Namespace(a=1)}), r"\(argparse\.Namespace\); refused\. Where it comes"),
    "an instance (INST)": (pickled(b"(ios\nsystem\n"), "pickle opcode INST"),
    "a getattr through dots": (
        pickled(b"ctorch\n_utils._rebuild_tensor_v2\n"),
        r"\(torch\._utils\._rebuild_tensor_v2\)",
    ),
    "an extension (EXT1)": (pickled(b"\x82\x01"), "pickle opcode EXT1"),
    "a memo index of 4 billion": (pickled(b"Nr\xff\xff\xff\x7f"), "skips memo entries"),
    "a memo entry that is not there": (pickled(b"h\x05"), "is damaged"),
    "an empty stack": (pickled(b"0"), "pickle opcode POP|is damaged"),
    "a call of a dict": (pickled(b"})R"), "is damaged"),
    "attributes set on a function": (pickled(b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aNsb"), "is damaged"),
    "slots set on a function": (
        pickled(b"ccollections\nOrderedDict\nN}X\x04\x00\x00\x00_runNs\x86b"),
        "state set on _Func",
    ),
    "attributes set on a dtype": (pickled(b"ctorch\nFloatStorage\n}X\x01\x00\x00\x00aNsb"), "is damaged"),
    "text longer than the file": (pickled(b"X\xff\xff\xff\x7fa"), "damaged pickle"),
    "bytes longer than memory": (pickled(b"\x8d" + b"\xff" * 7 + b"\x7fa"), "damaged pickle"),
    "a number of a million digits": (pickled(b"L" + b"9" * 10**6 + b"L\n"), "pickle opcode LONG|damaged pickle"),
    "a million lists in each other": (pickled(b"]" * 10**6 + b"a" * (10**6 - 1)), "more than 500,000 steps"),
    "a pickle of 5 MB": (pickled(b"(" + b"N" * (5 << 20) + b"l"), r"has 5,242,\d\d\d bytes; a model's has at most"),
    "a key of 2^60 values": (pickled(shared_tuples(60)), "nests tuples without end; refused"),
    "a key 200,000 tuples deep": (pickled(b"})" + b"\x85" * 200_000 + b"Ns"), "nests tuples without end; refused"),
    "a size copied until memory ends": (pickled(copies(b"ctorch\nSize\n")), "is damaged"),
    "a set copied until memory ends": (pickled(copies(b"cbuiltins\nset\n")), "is damaged"),
    "a dict copied until memory ends": (pickled(copies(b"ccollections\nOrderedDict\n")), "is damaged"),
    "a dict whose methods are hidden": (
        pickled(b"ccollections\nOrderedDict\n)R}X\x03\x00\x00\x00getK\x01sb"),
        "has no tensors under model",
    ),
    "a parameter that is a list": (pickled(b"ctorch._utils\n_rebuild_parameter\n]\x85R"), "a parameter of something"),
    "a persistent id that is text": (pickled(b"X\x01\x00\x00\x00aQ"), "is damaged"),
    "no end": (b"\x80\x02}", "damaged pickle"),
    "nothing": (b"", "damaged pickle"),
}


def overlapping(path: Path) -> None:
    """One entry of 4 MB that the directory lists 2,000 times."""
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("archive/data.pkl", pickled(b"}"))
        out.writestr("archive/data/0", bytes(4 << 20))
        for n in range(1, 2000):
            again = copy.copy(out.filelist[1])
            again.filename = f"archive/data/{n}"
            out.filelist.append(again)


def directory_elsewhere(path: Path) -> None:
    content = bytearray(archive(path, a_tensor(), FLOATS).read_bytes())
    entry = content.rindex(b"PK\x01\x02")  # of data/0, the last one
    content[entry + 42 : entry + 46] = struct.pack("<I", 7)
    path.write_bytes(content)


def two_pickles(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("a/data.pkl", pickled(b"}"))
        out.writestr("b/data.pkl", pickled(b"}"))


def old_format(path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def repeated(path: Path) -> None:
    """A tensor of 1 MB under 3,000 names: written out it is 3 GB."""
    tensor = torch.zeros(1 << 18)
    torch.save({"model": {f"h.{n}.w": tensor for n in range(3000)}}, path)


CONTAINERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a compressed archive": (
        lambda p: archive(p, pickled(b"N"), {"data/0": b"\0" * 10**7}, compress=True),
        r"is compressed, which torch\.save never does; refused",
    ),
    "a directory that points elsewhere": (directory_elsewhere, "data/0 has no header where the directory says"),
    "torch before 1.6": (
        old_format,
        r"before 1\.6, which is not read; convert it where torch is installed: python",
    ),
    "entries of the same bytes": (overlapping, r"lists 8,388,\d\d\d,\d\d\d|lists [\d,]+ bytes of entries, file is 4,"),
    "one tensor under 3,000 names": (repeated, r"has tensors of 3,145,728,000 bytes in a file of 1,"),
    "no zip": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(400)), r"is not a file of torch\.save, or cut short"),
    "nothing at all": (lambda p: p.write_bytes(b""), r"is not a file of torch\.save, or cut short"),
    "two pickles": (two_pickles, "is a zip file with 2 data.pkl; torch.save writes one"),
    "cut in the middle": (
        lambda p: p.write_bytes(saved({"a": torch.ones(9)})[:700]),
        r"is not a file of torch\.save, or cut short",
    ),
}


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no tensors": (lambda c: {"epoch": 3}, "has no tensors under model, model_state_dict, state_dict or at its top"),
    "a list": (lambda c: [1, 2], "holds a list; expected a dict of tensors"),
    "another architecture": (lambda c: {"model": {"encoder.weight": torch.ones(2, 2)}}, "only GPT-2's architecture"),
    "a missing tensor": (
        lambda c: c["model"].pop("transformer.h.1.mlp.c_fc.weight") is None or c,
        r"lacks 1 of \d+ tensors \(first: transformer\.h\.1\.mlp\.c_fc\.weight\)",
    ),
    "another size": (lambda c: c["model_args"].update(n_layer=3) or c, r"has n_layer=3, its tensors say 2; correct it"),
    "heads that do not divide": (lambda c: c["model_args"].update(n_head=5) or c, "not a multiple of n_head=5"),
    "no embedding": (lambda c: c["model"].pop("transformer.wte.weight") is None or c, r"wte\.weight is missing"),
    "one name twice": (
        lambda c: c["model"].update({"module.lm_head.weight": torch.ones(37, 24)}) or c,
        r"has lm_head\.weight twice, with and without a prefix",
    ),
    "heads that are a tensor": (
        lambda c: c["model_args"].update(n_head=torch.ones(3)) or c,
        "does not say its number of attention heads",
    ),
    "heads that are text": (lambda c: c["model_args"].update(n_head="x" * 10**6) or c, "n_head must be a positive int"),
    "no heads": (lambda c: c["model_args"].update(n_head=0) or c, "n_head must be a positive integer"),
    "half a layer": (lambda c: c["model_args"].update(n_layer=0.5) or c, "has n_layer=0.5, its tensors say 2"),
    "an epsilon that is no number": (
        lambda c: c["model_args"].update(layer_norm_epsilon=float("nan")) or c,
        "must be a positive number, got nan",
    ),
    "integers": (
        lambda c: c["model"].update({"transformer.ln_f.weight": torch.ones(24, dtype=torch.int32)}) or c,
        r"transformer\.ln_f\.weight is int32; jaxgpt reads float32, bfloat16, float16",
    ),
}


def _lie(lie: str) -> Callable[[Path], object]:
    return lambda path: archive(path, *LIES[lie][:2])


def _bomb(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content) if content[:2] == b"PK" else archive(path, content)


def _wrong(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        content = {"model": copy.copy(nano_state(bias=True)), "model_args": dict(SIZES)}
        torch.save(change(content), path)

    return write


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    **{name: (_lie(name), words) for name, (_, _, words) in LIES.items()},
    **{name: (_bomb(content), words) for name, (content, words) in BOMBS.items()},
    **CONTAINERS,
    **{name: (_wrong(change), words) for name, (change, words) in WRONG.items()},
}
"""What writes each file, and words of the refusal, as a pattern."""
READ_BY_INSPECT = ("one tensor under 3,000 names",)
"""Files that are no model, but whose tensors can be shown."""
