"""What lies in a folder: the network's class and configuration, its weights, its noise schedule. Nothing is loaded here.

The folder is one of Hugging Face's formats, already on this machine. Weights are safetensors; a folder that has them
only in a format that can run code is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stepmark.hub.choice import Part
from stepmark.hub.image_kinds import KINDS

IMAGE_CLASSES = tuple(KINDS)
TEXT_CLASSES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # of the last those that write text alone
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        FileNotFoundError, ValueError: there is none, in one line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; give a folder that save_pretrained wrote")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; download it again")
    return found


def network_in(folder: Path) -> Part:
    """The network in a folder, or in the unet/ or transformer/ of a pipeline.

    Raises:
        FileNotFoundError, ValueError: it cannot be measured. One line that names the mend.
    """
    if (folder / "model_index.json").is_file():
        inside = [folder / name for name in ("unet", "transformer") if (folder / name).is_dir()]
        if not inside:
            raise FileNotFoundError(f"{folder} is a pipeline without unet/ or transformer/; only those can be measured")
        folder = inside[0]
    config = read_json(folder / "config.json")
    kind = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    if not isinstance(kind, str):
        raise ValueError(f"{folder}/config.json names no class (_class_name or architectures); save the model again")
    if kind not in IMAGE_CLASSES and not kind.endswith(TEXT_CLASSES):
        raise ValueError(f"{folder}: {kind} cannot be measured; {', '.join(IMAGE_CLASSES)} and ...ForCausalLM can")
    weights, variant = _weights(folder, "diffusion_pytorch_model" if kind in IMAGE_CLASSES else "model")
    return Part(folder, kind, config, weights, variant)


def _weights(folder: Path, stem: str) -> tuple[tuple[Path, ...], str | None]:
    """The files of weights, and the variant ("fp16") that their names carry."""
    for variant in (None, "fp16"):
        name = stem if variant is None else f"{stem}.{variant}"
        index = folder / f"{stem}.safetensors.index.{'json' if variant is None else f'{variant}.json'}"
        if index.is_file():
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
            lacking = [shard for shard in shards if not (folder / shard).is_file()]
            if lacking or not shards:
                raise FileNotFoundError(
                    f"{folder}: {index.name} names {', '.join(lacking) or 'no file'}; download it again"
                )
            return tuple(folder / shard for shard in shards), variant
        if (folder / f"{name}.safetensors").is_file():
            return (folder / f"{name}.safetensors",), variant
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickled:
        raise ValueError(
            f"{folder}: weights are in {pickled[0]}, a format that can run code when it is loaded; load it where you "
            "trust it, and save_pretrained(..., safe_serialization=True)"
        )
    raise FileNotFoundError(f"{folder} holds no {stem}.safetensors; download the weights too")


def beside(part: Part, name: str) -> dict[str, Any]:
    """The configuration of another part of the pipeline that a network is of; {} where there is none."""
    path = part.folder.parent / name / "config.json"
    return read_json(path) if path.is_file() else {}


def schedule_in(folder: Path, part: Part) -> tuple[dict[str, Any], str]:
    """The configuration of the noise schedule, and what the network predicts: "flow", "epsilon", "v" or "sample".

    Raises:
        FileNotFoundError, ValueError: there is none, or none that can be measured on.
    """
    places = [
        part.folder / "scheduler_config.json",
        part.folder / "scheduler" / "scheduler_config.json",
        part.folder.parent / "scheduler" / "scheduler_config.json",
    ]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder} has no scheduler/scheduler_config.json, which says what the network was trained on; add it"
        )
    config = read_json(path)
    name = str(config.get("_class_name", ""))
    if name.startswith(("EDM", "ScoreSdeVe", "KarrasVe", "CMStochastic", "Cosine", "VQDiffusion")):
        raise ValueError(f"{path}: {name} is no schedule of steps beta or of straight paths; it cannot be measured")
    if config.get("invert_sigmas"):
        raise ValueError(f"{path}: invert_sigmas turns time around; it cannot be measured")
    kinds = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}
    said = "flow_prediction" if "FlowMatch" in name else config.get("prediction_type", "epsilon")
    if said not in kinds:
        raise ValueError(f"{path}: prediction_type {said!r} is not known; it is one of {', '.join(kinds)}")
    return config, kinds[said]
