"""Starting an encoder from weights that exist: of an earlier run or bundle, torchvision or timm.

Continued pretraining wants smaller steps than a fresh start does: recipe `continue`.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byol_serving.bundle import INFO_FILE, load_bundle
from byol_serving.errors import InvalidConfig, InvalidSource
from byol_training.checkpoint import encoder_state, find_checkpoint, load_checkpoint
from byol_training.encoders import Encoder, TimmEncoder
from byol_training.encoders_timm import build_trunk

State = dict[str, Tensor]

_LEAST_SHARE = 0.5  # of the encoder's numbers that a file must hold, or it is of another one


def start_from(encoder: Encoder, where: str, *, name: str, image_size: int) -> None:
    """Loads weights into a fresh encoder, in place.

    Args:
        encoder: as `build_encoder` gives it.
        where: a run directory or checkpoint of `byol train` (the online encoder is taken); a bundle
            that was exported with its weights; a file of weights, .pth or .safetensors, named as
            torchvision or timm name them; or `timm`, for the weights that timm downloads for this
            network. Classifiers are passed over, and so is a stem of another shape.
        name: of the encoder, for messages.
        image_size: side of its images.

    Raises:
        InvalidSource: the file cannot be read, or is of another encoder; a bundle without weights.
        InvalidBundle: a damaged bundle.
        InvalidConfig: `timm` with an encoder that is none of timm's.
    """
    if where == "timm":
        state = _downloaded(name, image_size)
    elif Path(where).suffix in (".safetensors", ".pth", ".pt"):
        state = {_renamed(key, encoder): value for key, value in _read(Path(where)).items()}
    elif (Path(where) / INFO_FILE).exists():
        state = _of_bundle(Path(where))
    else:
        state = encoder_state(load_checkpoint(find_checkpoint(Path(where))))
    own = encoder.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    found, all_of = (sum(v.numel() for v in values) for values in (fitting.values(), own.values()))
    if found < _LEAST_SHARE * all_of:
        raise InvalidSource(
            f"{where} holds {found:,} of the {all_of:,} weights of encoder {name};"
            " give weights of that encoder, or set the encoder that they are of"
        )
    encoder.load_state_dict(fitting, strict=False)


def _downloaded(name: str, image_size: int) -> State:
    if not name.startswith("timm:"):
        raise InvalidConfig(
            f"start_from timm needs an encoder of timm's, not {name}; set encoder to timm:NAME,"
            " or give a file of weights"
        )
    trunk, _ = build_trunk(name.removeprefix("timm:"), image_size=image_size, pretrained=True)
    return {f"stages.trunk.{key}": value for key, value in trunk.state_dict().items()}


def _of_bundle(path: Path) -> State:
    weights = load_bundle(path).weights_path
    if weights is None:
        raise InvalidSource(
            f"{path} is a bundle without the weights that training starts from; export it again"
            " with --with-weights, or give the run that it was exported from"
        )
    return _read(weights)


def _read(path: Path) -> State:
    """A file's tensors by name; nothing in it is run."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InvalidSource(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # pickle, zip and safetensors raise a dozen kinds of their own
        reason = str(error).splitlines()[0][:120]
        raise InvalidSource(f"{path} holds no weights that can be read ({reason})") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict):
        raise InvalidSource(f"{path} holds a {type(loaded).__name__}; give a state dict")
    return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}


def _renamed(key: str, encoder: Encoder) -> str:
    """The name in `Encoder` of what torchvision or timm call `key`."""
    if isinstance(encoder, TimmEncoder):
        return f"stages.trunk.net.{key}"
    if found := re.fullmatch(r"(conv1|bn1)\.(.*)", key):  # a ResNet's stem
        return f"stages.stem.{('conv1', 'bn1').index(found[1])}.{found[2]}"
    if found := re.fullmatch(r"features\.(\d+)\.(.*)", key):  # of ConvNeXt, in pairs
        number = int(found[1])
        return f"stages.stage{number // 2 + 1}.{number % 2}.{found[2]}"
    return f"stages.{key}"
