"""The golden numbers as the tests use them: key lists, hash-filled weights, and the logits they must give."""

import json
import re
import zlib
from math import prod
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"


def golden(name):
    """The content of tests/golden/NAME.json."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def official_shapes(model, size=None):
    """{key: shape} of the reference's state dict; `size` if not its native 224 (the 384 models: their 224 twins).

    The file writes blocks that repeat as one key, `blocks.{0-5,7}.norm.weight`.
    """
    shapes = {}
    for key, shape in golden("state_dicts")[model.replace("_384", "_224")]["keys"].items():
        runs = re.search(r"\{(.*)\}", key)
        for run in runs[1].split(",") if runs else [""]:
            first, _, last = run.partition("-")
            for index in range(int(first), int(last or first) + 1) if run else [None]:
                shapes[re.sub(r"\{.*\}", str(index), key)] = tuple(shape)
    return {key: _at_size(key, shape, size) for key, shape in shapes.items()} if size else shapes


def _at_size(key, shape, size):
    """DeiT: patches of 16. Swin: windows of size / 32 in all stages, and 4^stage fewer of them in each."""
    window = size // 32
    if key == "pos_embed":
        return (1, 1 + (size // 16) ** 2, shape[2])
    if key.endswith("relative_position_bias_table"):
        return ((2 * window - 1) ** 2, shape[1])
    if key.endswith("relative_position_index"):
        return (window**2, window**2)
    return (shape[0], window**2, window**2) if key.endswith("attn_mask") else shape


def uniform(name, count):
    """`count` numbers in [0, 1) that depend on the name alone: a hash of the index and the name's CRC."""
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64
    h = (np.arange(count, dtype=np.uint64) * shift(2654435761) + shift(zlib.crc32(name.encode()))) & mask
    h ^= h >> shift(16)
    h = (h * shift(0x85EBCA6B)) & mask
    h ^= h >> shift(13)
    h = (h * shift(0xC2B2AE35)) & mask
    h ^= h >> shift(16)
    return h.astype(np.float64) / 2**32


def filled(shapes):
    """A state dict of these shapes with the golden weights; integer and mask buffers are zeros."""
    return {key: _value(key, shape) for key, shape in shapes.items()}


def _value(key, shape):
    leaf = key.rpartition(".")[2]
    if leaf in ("relative_position_index", "num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if leaf == "attn_mask":
        return torch.zeros(shape)
    u = uniform(key, prod(shape))
    z = 2 * u - 1
    if re.match(r"relative_position_bias_table|pos_embed\d?|cls_token", leaf):
        value = 0.5 * z
    elif len(shape) >= 2:
        value = z * (3 / prod(shape[1:])) ** 0.5
    else:
        value = 0.2 * z if leaf.endswith(("running_mean", "bias")) else 0.5 + u
    return torch.from_numpy(value.reshape(shape).astype(np.float32))


def image(size):
    """The golden input, (1, 3, size, size)."""
    z = 1.7 * (2 * uniform("input", 3 * size * size) - 1)
    return torch.from_numpy(z.reshape(1, 3, size, size).astype(np.float32))


def logit_error(model, reference, size):
    """Largest deviation of a model's logits on the golden input from the reference's."""
    with torch.no_grad():
        logits = model.eval()(image(size))[0].double()
    expected = golden("forward")["models"][reference][str(size)]
    got = [*logits[:8].tolist(), logits.mean().item(), logits.std().item()]
    error = max(abs(a - b) for a, b in zip(got, [*expected["first8"], expected["mean"], expected["std"]], strict=True))
    return error if int(logits.argmax()) == expected["argmax"] else float("inf")
