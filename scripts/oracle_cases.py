"""The worked cases of docs/oracle.md, carried out with the commands a user would type; prints them as Markdown.

Needs the folder that scripts/demo.py leaves: a small model before and after fine-tuning.

    python scripts/oracle_cases.py [DEMO]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

TRANSPOSE = """\
from safetensors.torch import load_file, save_file

tensors = load_file("hf/model.safetensors")
name = "transformer.h.1.attn.c_proj.weight"
tensors[name] = tensors[name].T.contiguous()
save_file(tensors, "wrong/model.safetensors", metadata={"format": "pt"})
"""
CASES = {
    "A transposed square projection": (
        "jaxgpt export assistant hf --format hf",
        "cp -r hf wrong",
        "python transpose.py",
        "jaxgpt import wrong wrong.jaxgpt",
        "python -m oracle bisect wrong.jaxgpt --reference hf --html transposed.html",
    ),
    "Weights of another revision": (
        "jaxgpt export base hf-base --format hf",
        "python -m oracle bisect assistant --reference hf-base",
    ),
    "A cache position off by one": ("python -m oracle bisect assistant --reference hf --plant 'cache offset'",),
}


def shown(command: str, folder: Path) -> str:
    """The command and what it printed."""
    words = command.replace("python ", f"{sys.executable} ", 1) if command.startswith("python ") else command
    if words.startswith("jaxgpt "):
        words = words.replace("jaxgpt ", f"{Path(sys.executable).parent / 'jaxgpt'} ", 1)
    done = subprocess.run(words, shell=True, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(f"{command} ended with exit code {done.returncode}: {done.stderr}")
    return f"$ {command}\n{done.stdout}"


def main() -> None:
    """Print every case."""
    demo = Path(sys.argv[1] if len(sys.argv) > 1 else "demo").absolute()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in ("base", "assistant"):
            if not (demo / name).is_dir():
                sys.exit(f"{demo} has no folder {name}; run `make demo` first")
            (folder / name).symlink_to(demo / name)
        (folder / "transpose.py").write_text(TRANSPOSE)
        for title, commands in CASES.items():
            output = "".join(shown(command, folder) for command in commands).rstrip()
            print(f"### {title}\n\n```console\n{output}\n```\n", flush=True)


if __name__ == "__main__":
    main()
