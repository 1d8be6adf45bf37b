"""Settings: defaults, recipes, flags. What is unknown or of the wrong type is refused; the flags stay what they are."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, fields
from typing import get_args, get_type_hints

import pytest
import yaml
from conftest import ROOT

from config import Config, load_curriculum, load_recipe, plain, to_yaml
from config.command_line import FIRST, flags_of, parse_config, parse_stated
from config.paths import PATHS
from curriculum.operators import OPERATORS

# What others' scripts and recipes are written against: a name may be added here, but none taken away or renamed.
FLAGS = """
allow_change amp augment_on auto_resume baseline_epochs batch_size channels_last class_map clip_grad color_jitter
compile crop_pct crop_ratio crop_scale curriculum cutmix data_path data_set decoder deterministic device devices
doctor drop_path early_large_batch epochs eval eval_data eval_interval eval_size finetune forward_batch
head_init_scale hflip input_size keep_checkpoints layer_decay linear_probe log_interval lr lr_rule mae_target
magnitude mask_ratio max_bad max_magnitude micro_batch min_lr mixup mixup_prob mixup_switch_prob model model_args
model_ema model_ema_decay momentum num_classes num_images num_workers on_nonfinite operator opt opt_betas opt_eps
output_dir pipeline plan predict predict_to real_labels replay replay_memory reprob resume rows save_interval seed
smoothing speeds stop_after suggest task timeout top_k train_interpolation train_split val_per_class val_split
warmup_epochs weight_decay weight_decay_end patience stop_if wandb
"""
# The defaults that the published curricula and recipes rest on.
DEFAULTS = {
    "data_set": "folder",
    "curriculum": "efficienttrain++",
    "input_size": 224,
    "batch_size": 4096,
    "micro_batch": None,
    "opt": "adamw",
    "lr": 4e-3,
    "min_lr": 1e-6,
    "weight_decay": 0.05,
    "opt_betas": None,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "smoothing": 0.1,
    "reprob": 0.25,
    "baseline_epochs": None,
    "crop_pct": 0.875,
    "max_magnitude": 9.0,
    "auto_resume": True,
    "device": "auto",
    "pipeline": "exact",
    "plan": "none",
    "amp": "none",
}


def wrong(argv, capsys):
    """The one line that wrong usage prints; exits with 2."""
    with pytest.raises(SystemExit) as stop:
        parse_config(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.fixture
def recipe(tmp_path):
    def write(content, name="recipe.yaml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


def test_the_flags_stay(capsys):
    names = {field.name for field in fields(Config)}
    assert names >= set(FLAGS.split())
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name in names:
        assert f"--{name} " in text


def test_every_setting_has_a_line_of_help(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    text = capsys.readouterr().out
    for field in fields(Config):
        description = re.search(
            rf"^  --{field.name} \S.*?\s{{2,}}(.*?)(?=^  --|^\S|\Z)", text, re.MULTILINE | re.DOTALL
        )[1]
        assert len(description.split()) >= 2, field.name


def test_operators_are_the_curriculums():
    """A type is written out; what it lists is what curriculum/ has."""
    choices = get_args(get_args(get_type_hints(Config)["operator"])[0])
    assert choices == OPERATORS


def test_plain_types():
    config = Config(forward_batch={64: 4}, opt_betas=(0.9, 0.95))
    assert plain(config) == json.loads(json.dumps(asdict(config)))
    assert (plain(config)["opt_betas"], plain(config)["forward_batch"]) == ([0.9, 0.95], {"64": 4})
    assert plain({"a": (1, (2,))}) == {"a": [1, [2]]}


def test_defaults():
    config = parse_config([])
    assert config == Config()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


def test_recipe_then_flags(recipe):
    path = recipe({"model": "swin_tiny", "lr": 1e-3, "model_ema": True, "warmup_epochs": "20 passes"})
    config = parse_config(["--recipe", path, "--lr", "0.5", "--seed=3"])
    assert (config.model, config.lr, config.model_ema, config.seed) == ("swin_tiny", 0.5, True, 3)
    assert config.warmup_epochs == "20 passes"
    assert config.batch_size == 4096
    assert parse_config(["--lr", "0.5", f"--recipe={path}"]).lr == 0.5  # the order does not matter


def test_help_is_for_people(capsys):
    """Types as one writes them; what matters first comes first; each setting once."""
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    text = capsys.readouterr().out
    for inner in ("Union", "Literal", "NoneType", "null", "<class", "Optional", "type:", "%%"):
        assert inner not in text, inner
    shown = re.findall(r"^  --(\w+) ", text, re.MULTILINE)
    assert shown[: 1 + len(FIRST)] == ["recipe", *FIRST] and len(FIRST) == 9
    assert sorted(shown) == sorted(["recipe", *(field.name for field in fields(Config))])
    assert [line[:-1] for line in text.splitlines() if re.fullmatch(r"\w.*:", line)] == [
        *("options", "the settings to begin with", "run", "data", "model", "curriculum", "optimization"),
        "regularization (after RandAugment)",
        "detection and segmentation",
    ]
    assert "--crop_scale X,X" in text and "(default: 0.08,1)" in text


@pytest.mark.parametrize("argv, code", [(["--help"], 0), (["--lrr", "3"], 2), (["--lr", "fast"], 2)])
def test_help_and_typos_do_not_wait_for_torch(argv, code):
    program = (
        "import runpy, sys\nsys.argv = ['main.py', *sys.argv[1:]]\n"
        "try:\n    runpy.run_path('main.py', run_name='__main__')\n"
        "finally:\n    print('heavy', sorted({'torch', 'timm', 'torchvision', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and "heavy []" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("pair", ["0.9,0.95", "[0.9,0.95]", "[0.9, 0.95]"])
def test_lists_without_brackets(pair):
    assert parse_config(["--opt_betas", pair]).opt_betas == (0.9, 0.95)
    config = parse_config(["--replay", "4,2,1", "--decoder=4,256,8", "--rows", "a,b", "--train_split", "a,b"])
    assert (config.replay, config.decoder, config.rows, config.train_split) == (
        [4, 2, 1],
        (4, 256, 8),
        ["a", "b"],
        "a,b",
    )


def test_what_was_stated(recipe):
    path = recipe({"lr": 4e-3, "seed": 1})
    config, stated = parse_stated(["--recipe", path, "--epochs", "200", "--model_args.depth", "3"])
    assert stated == {"lr", "seed", "epochs", "model_args"} and config.model_args == {"depth": 3}
    assert flags_of(["--recipe", path, "--epochs=200"]) == {"recipe", "epochs"}


NO_PATHS = """
amp augment_on allow_change data_set device head label_key label_separator lr_rule mae_target magnitude model
on_nonfinite operator opt pipeline plan schedule stop_if task train_interpolation wandb
"""


def test_paths_begin_at_home(recipe, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    for given, want in (("~/a b/x", "/home/me/a b/x"), ("a/~", "a/~"), ("./~/x", "./~/x"), ("s3://a/~x", "s3://a/~x")):
        by_flags = parse_config([f"--{name}={given}" for name in PATHS])
        by_recipe = parse_config(["--recipe", recipe(dict.fromkeys(PATHS, given))])
        for config in (by_flags, by_recipe):
            assert [getattr(config, name) for name in PATHS] == [want] * len(PATHS)
    assert parse_config(["--output_dir", "~root/x"]).output_dir.endswith("root/x")
    assert "--output_dir ~nobody_here/x: there is no user 'nobody_here'; write ./~nobody_here/x" in wrong(
        ["--output_dir", "~nobody_here/x"], capsys
    )
    # Every setting that takes any text is a path, or known to be none.
    types = get_type_hints(Config)
    texts = {name for name, kind in types.items() if kind is str or str in get_args(kind)}
    durations = {name for name, kind in types.items() if float in get_args(kind)}
    assert texts - durations <= {*PATHS, *NO_PATHS.split()}


def test_recipes_begin_at_home(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe({"lr": 0.5}, "base.yaml")
    path = recipe({"extends": "~/base.yaml"}, "below/last.yaml")
    assert parse_config(["--recipe", path]).lr == parse_config(["--recipe", "~/base.yaml"]).lr == 0.5


def test_part_of_a_mapping_keeps_the_rest_of_the_recipe(recipe):
    path = recipe({"model_args": {"depth": 3, "width": 8}})
    assert parse_config(["--recipe", path, "--model_args.width", "9"]).model_args == {"depth": 3, "width": 9}


def test_types_of_flags():
    config = parse_config(
        [
            *("--model_ema", "true", "--eval", "false", "--warmup_epochs", "3.7", "--opt_betas", "[0.9,0.95]"),
            *("--crop_scale", "[0.3,1]", "--micro_batch", "null", "--model_args", "{ls_init_value: 1e-6}"),
            *("--epochs", "2", "--eval_interval", "20%"),
        ]
    )
    assert config.model_ema is True and config.eval is False
    assert config.warmup_epochs == 3.7 and config.eval_interval == "20%"
    assert config.opt_betas == (0.9, 0.95) and config.crop_scale == (0.3, 1.0)
    assert config.micro_batch is None and config.model_args == {"ls_init_value": 1e-6}


def test_intervals_may_be_numbers_in_a_recipe(recipe):
    path = recipe("eval_interval: 2\nsave_interval: 0.5\nlog_interval: 100 steps\nwarmup_epochs: 5\n")
    config = parse_config(["--recipe", path])
    assert [float(config.eval_interval), float(config.save_interval)] == [2, 0.5]
    assert config.log_interval == "100 steps" and config.warmup_epochs == 5


def test_extends(recipe):
    recipe({"model": "swin_tiny", "lr": 1e-3, "seed": 1}, "_base.yaml")
    recipe({"extends": "_base.yaml", "lr": 2e-3, "mixup": 0.1}, "middle.yaml")
    path = recipe({"extends": "../middle.yaml", "seed": 9}, "below/last.yaml")
    config = parse_config(["--recipe", path])
    assert (config.model, config.lr, config.mixup, config.seed) == ("swin_tiny", 2e-3, 0.1, 9)


def test_to_yaml_is_a_recipe_of_the_same_settings(recipe):
    first = parse_config(
        ["--lr", "0.5", "--opt_betas", "[0.9,0.95]", "--model_args", "{depth: 3}", "--curriculum", "{clock: compute}"]
        + ["--forward_batch", "{64: 4}"]
    )
    again = parse_config(["--recipe", recipe(to_yaml(first))])
    assert asdict(again) == asdict(first)
    assert asdict(parse_config([])) != asdict(first)  # negative control


def test_curriculum_file(recipe):
    mapping = {"clock": "epochs", "stages": [{"until": 1, "input_size": 64}]}
    assert load_curriculum(recipe(mapping)) == mapping
    assert load_curriculum("efficienttrain") == "efficienttrain"
    assert load_curriculum(mapping) == mapping


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--lrr", "3"], ["'lrr'", "did you mean lr"]),
        (["--betas", "[0.9,0.99]"], ["'betas'", "opt_betas"]),
        (["--mod", "resnet50"], ["'mod'", "model"]),  # no abbreviations
        (["--print_config"], ["'print_config'"]),
        (["--zzzz", "1"], ["'zzzz'", "--help lists all"]),
        (["--recip", "x.yaml"], ["'recip'", "did you mean recipe"]),
        (["--lr", "1", "2"], ["'2' belongs to no setting"]),
        (["--replay", "4,", "2"], ["--replay is 4,; write --replay N,N,..."]),
        (["--recipe", "a.yaml", "--recipe", "b.yaml"], ["--recipe is given twice", "extends: b.yaml"]),
        (["--recipe", "a.yaml", "--lr", "1", "--recipe=b.yaml"], ["--recipe is given twice"]),
        (["stray"], ["stray"]),
        (["--lr"], ["--lr"]),
        (["--lr", "fast"], ["lr", "fast"]),
        (["--seed", "1.5"], ["seed", "1.5"]),
        (["--amp", "fp8"], ["amp", "fp8", "bf16"]),
        (["--plan", "please"], ["plan", "please", "table"]),
        (["--model_ema", "7"], ["model_ema", "7"]),
        (["--crop_scale", "[0.3]"], ["--crop_scale is [0.3]; write --crop_scale X,X"]),
        (["--crop_scale", "0.3,0.5,1"], ["--crop_scale X,X"]),
        (["--micro_batch", "many"], ["--micro_batch is many; write --micro_batch N|auto"]),
        (["--model_args", "7"], ["model_args"]),
        (["--recipe"], ["--recipe"]),
        (["--recipe", "nowhere/at_all.yaml"], ["nowhere/at_all.yaml", "No such file"]),
        (["--recipe", "."], ["recipe .", "directory"]),
    ],
)
def test_wrong_flags(argv, words, capsys):
    message = wrong(argv, capsys)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "content, words",
    [
        ("learning_rate: 3\n", ["unknown setting 'learning_rate'"]),
        ("modell: resnet50\n", ["'modell'", "model"]),
        ("lr: fast\n", ["lr", "fast"]),
        ("model_ema: 3\n", ["model_ema"]),
        ("- lr\n- 3\n", ["mapping"]),
        ("", ["mapping"]),
        ("just words\n", ["mapping"]),
        ("lr: [1\n", ["not YAML"]),
        ("3: 4\n", ["unknown setting 3"]),
        ("extends: missing.yaml\n", ["missing.yaml", "No such file"]),
        ("extends: recipe.yaml\n", ["extends itself"]),
        ("extends: [1, 2]\n", ["cannot be read"]),
        ("lr: !!python/object/apply:os.system ['touch pwned']\n", ["not YAML"]),
        ("lr: 1\0\n", ["not YAML"]),
        ("lr: 2001-99-99\n", ["not YAML"]),
        ("recipe: other.yaml\n", ["'recipe'"]),
        ("help: 3\n", ["'help'"]),
        ("? [a, b]\n: 3\n", ["not YAML"]),
        ("lr: " + "[" * 1500, ["not YAML"]),
    ],
)
def test_wrong_recipes(content, words, recipe, capsys):
    path = recipe(content)
    message = wrong(["--recipe", path], capsys)
    assert path.rsplit("/", 1)[0] in message
    assert all(word in message for word in words), message[:500]


def test_recipe_that_is_no_text(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(bytes(range(256)))
    assert "not a text file" in wrong(["--recipe", str(path)], capsys)


def test_two_recipes_that_extend_each_other(recipe):
    recipe("extends: b.yaml\n", "a.yaml")
    path = recipe("extends: a.yaml\n", "b.yaml")
    with pytest.raises(ValueError, match="extends itself"):
        load_recipe(path)
