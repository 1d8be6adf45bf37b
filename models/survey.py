"""Train one small model of every timm family across three input sizes, and print what works.

    python -m models.survey [--json] [FAMILY ...]

Each is built at 3/7 of its native size, or the nearest size that it takes, makes an optimizer step, is resized to 5/7
and to the native size with its momentum and EMA, and makes a step at each. The 98 families of timm 1.0.31 take about 7
minutes and 7 GB on one core. Exit status 1 if a family failed in training, after its sizes had been found good.
"""

import argparse
import json
import sys
import time

import timm
import torch
from timm.utils import ModelEmaV3

from curriculum.resize import InputSizeError, check_input_sizes, set_input_size
from curriculum.skeleton import Skeleton

from .registry import create_model

FRACTIONS = (3 / 7, 5 / 7, 1)
# All layers of these are alike, and all of them would take 14 GB.
SETTINGS = {name: {"depth": 4} for name in ("deepseek_vit_412m", "gemma4_vit_167m", "qwen3_vit_88m")}
# The smallest of each family by parameters; one that is not named here is taken by its first name in the alphabet.
SMALLEST = [
    "beit_base_patch16_224",
    "halonet_h1",
    "test_byobnet",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "convmixer_768_32",
    "test_convnext",
    "cpubone_nano",
    "crossvit_tiny_240",
    "csatv2",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "davit_tiny",
    "deepseek_vit_412m",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "test_efficientnet",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "vit_tiny_patch16_dinov3_qkvb",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "gemma4_vit_167m",
    "ghostnet_050",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "sam2_hiera_tiny",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2_small",
    "levit_128s",
    "lowformer_b0",
    "test_mambaout",
    "test_coatnet",
    "poolformerv2_s12",
    "gmlp_ti16_224",
    "mobilenetv3_small_050",
    "mobilenetv5_base",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "naflexvit_base_patch16_parfac_gap",
    "nasnetalarge",
    "nest_tiny",
    "nextvit_small",
    "test_nfnet",
    "pit_ti_224",
    "pnasnet5large",
    "pvt_v2_b0",
    "qwen3_vit_88m",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "test_resnet",
    "resnetv2_18",
    "rexnet_100",
    "selecsls42",
    "legacy_seresnet18",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_224",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "tresnet_m",
    "twins_svt_small",
    "vgg11",
    "visformer_tiny",
    "test_vit",
    "vit_tiny_r_s16_p8_224",
    "test_vit_relpos",
    "samvit_base_patch16_224",
    "vitamin_small_224",
    "volo_d1_224",
    "ese_vovnet19b_slim_dw",
    "legacy_xception",
    "xception41p",
    "xcit_nano_12_p8_224",
]


def families() -> dict[str, str]:
    """{timm module: the model that stands for it}, in alphabetical order."""
    found = {}
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if timm.model_entrypoint(names[0]).__module__.startswith("timm."):
            found[module] = next((name for name in SMALLEST if name in names), names[0])
    return found


def sizes_for(name: str) -> list[int]:
    """The sizes to train at: 3/7, 5/7 and 1 of the native size, each the nearest that the model takes.

    Raises:
        ValueError: if the model takes no smaller size than its native one.
    """
    native = timm.get_pretrained_cfg(name).input_size[-1]
    with torch.device("meta"), Skeleton():
        model = create_model(name, num_classes=10, input_size=native, **SETTINGS.get(name, {}))
    sizes = []
    for fraction in FRACTIONS:
        wanted = fraction * native
        size = max(1, round(wanted / model.size_multiple)) * model.size_multiple if fraction < 1 else native
        try:
            check_input_sizes(model, [size])
        except InputSizeError as error:
            near = [near for near in error.nearest if near < native]
            if not near:
                raise
            size = min(near, key=lambda near: abs(near - wanted))
        sizes.append(size)
    return sizes


def train(name: str, sizes: list[int]) -> None:
    """One step of SGD with momentum and EMA at each size, on one model."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=10, input_size=sizes[0], **SETTINGS.get(name, {})).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    ema = ModelEmaV3(model)
    for size in sizes:
        set_input_size(model, size, optimizer, ema)
        output = model(torch.randn(2, 3, size, size))
        if output.shape != (2, 10) or not output.isfinite().all():
            raise RuntimeError(
                f"output of shape {tuple(output.shape)} at {size}, finite: {bool(output.isfinite().all())}"
            )
        torch.nn.functional.cross_entropy(output, torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)


def survey(names: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Survey {family: model name}, a row for each. Returns ({failed: reason}, the families that failed in training)."""
    failed, broken = {}, []
    print(f"{'family':<26}{'model':<36}{'sizes':<18}{'seconds':>8}  result", flush=True)
    for family, name in names.items():
        started, sizes, result = time.perf_counter(), [], "ok"
        try:
            sizes = sizes_for(name)
            train(name, sizes)
        except Exception as error:
            result = failed[family] = " ".join(str(error).split())[:300] or type(error).__name__
            if sizes:
                broken.append(family)
                result = failed[family] = f"in training: {result}"
        text = " ".join(map(str, sizes))
        print(f"{family:<26}{name:<36}{text:<18}{time.perf_counter() - started:>8.1f}  {result}", flush=True)
    return failed, broken


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m models.survey", description="Train one model of each timm family.")
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help="timm's modules, e.g. swin_transformer; all if none"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    known = families()
    unknown = set(arguments.families) - set(known)
    if unknown:
        parser.error(f"no timm family {', '.join(sorted(unknown))}; they are {', '.join(known)}")
    names = {family: known[family] for family in arguments.families or known}
    failed, broken = survey(names)
    passed = len(names) - len(failed)
    print(f"{passed} of {len(names)} families train across input sizes")
    if arguments.json:
        print(json.dumps({"families": len(names), "passed": passed, "failed": failed}))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
