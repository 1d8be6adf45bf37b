"""Every setting, once: its kind, its type, its default and a line of help. Flags and recipe keys are made from it.

The kind (config/kinds.py) says what a resume does when the setting differs from the checkpoint's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from config.kinds import Free, Learned, Planned, Shape, Stateful


@dataclass(kw_only=True)
class RunConfig:
    """run"""

    output_dir: Free[str | None] = None
    """Folder for checkpoints, logs and the resolved configuration; required for training."""
    resume: Free[str | None] = None
    """Checkpoint to resume from (or to evaluate); launched again, the same command resumes from what it has done."""
    auto_resume: Free[bool] = True
    """Go on from the newest good checkpoint in --output_dir, if there is one."""
    rows: Free[list[str] | None] = None
    """Rows of the papers' tables that this run reproduces, for scripts/results.py; they are in recipes/papers.json."""
    eval: Free[bool] = False
    """Evaluate the model of --resume (or --finetune) and exit."""
    eval_data: Free[str | None] = None
    """--eval: folder of class folders to score instead of the validation images (ImageNet-V2, -A, -R, ...)."""
    real_labels: Free[bool] = False
    """--eval: add the accuracy on ImageNet's reassessed labels (ReaL)."""
    suggest: Free[bool] = False
    """Look at the images of --data_path and write a recipe for them, with the reasons, to standard output and as
    recipe.yaml to --output_dir; settings that are given are kept."""
    predict: Free[str | None] = None
    """Label images with the checkpoint of --resume and exit: an image, a folder, or a pattern like 'photos/*.jpg'. One
    JSON line each on standard output. --model_ema chooses the weights; default: those that scored best."""
    predict_to: Free[str | None] = None
    """--predict: write to this file instead; CSV if its name ends in .csv. Of a detector or segmenter: the folder for
    predictions.json (COCO's form) or label maps."""
    pictures: Free[bool] = False
    """--predict with a detector or segmenter: draw each image's predictions too."""
    top_k: Free[int] = 5
    """--predict: classes per image."""
    threshold: Free[float] = 0.5
    """--predict with a model of --task multilabel: labels of at least this probability are given."""
    eval_size: Learned[int | None] = None
    """Input size of every evaluation; default: the stage's, and the base size in the last stage."""
    plan: Free[Literal["none", "table", "json", "picture"]] = "none"
    """Print what the run would do (picture: draw it, as plan.svg) and exit; no data needed if --num_images is given."""
    devices: Free[int | None] = None
    """Number of devices that --plan assumes; default: those of this launch."""
    doctor: Free[bool] = False
    """Measure loading, copying and the training step at every input size on this machine, say what holds the run back,
    and exit; a minute at most."""
    speeds: Free[str | None] = None
    """JSON file of measured speeds, {"images_per_s": {"96": ..., "224": ...}} of one device: --plan then tells time."""
    device: Free[str] = "auto"
    """cuda, cpu or mps; auto takes the best that is there."""
    seed: Learned[int] = 0
    """Seed of initial weights, shuffling, augmentation, mixing and drop path."""
    deterministic: Free[bool] = False
    """Bit-identical results on CUDA too, where a stopped run then resumes exactly; slower there."""
    log_interval: Free[float | str] = "50 steps"
    """Duration between progress lines (the loss is read from the device only then)."""
    eval_interval: Free[float | str] = "5%"
    """Duration between evaluations (at the end of the epoch in which it elapses); there is always one at the end."""
    save_interval: Free[float | str] = "5%"
    """Duration between checkpoints, at the very step, or "30 minutes"; there is always one at the end."""
    keep_checkpoints: Free[int] = 2
    """Newest checkpoint-<step>.pth files kept, beside checkpoint-last.pth and checkpoint-best.pth."""
    allow_change: Free[str | None] = None
    """What may differ from the checkpoint that is resumed: settings by name, or model, data, curriculum, optimizer."""
    on_nonfinite: Free[Literal["stop", "skip"]] = "stop"
    """A loss that is not finite: stop the run, or leave such optimizer steps out (at most 1 % of them, 30 in a row)."""
    stop_after: Free[float | str | None] = None
    """Duration after which the run saves and ends before its plan does; without it the same command resumes."""
    patience: Free[float | str | None] = None
    """Duration without a better evaluation after which the run ends, saved; evaluations of one stage are compared."""
    stop_if: Free[str | None] = None
    """A number of log.txt that ends the run, saved, after a pass: "test_acc1 < 5 after 10%"."""
    wandb: Free[str | None] = None
    """Draw the run's curves in this project of Weights & Biases, too; ENTITY/PROJECT names whose. WANDB_MODE=offline
    keeps them in --output_dir."""
    timeout: Free[float] = 30.0
    """Minutes without progress after which a process that hangs ends the run, saying where it stands."""


@dataclass(kw_only=True)
class DataConfig:
    """data"""

    data_set: Free[str] = "folder"
    """folder: class folders; tar: archives of class folders, or the shards of WebDataset and img2dataset; parquet:
    files with an image column; hfds/NAME: a Hugging Face data set; tfds/NAME: TensorFlow Datasets in ArrayRecord files;
    cifar10, cifar100, flowers102, stanford_dogs: as their authors ship them. Of --task
    detection: coco (a COCO json), voc; of segmentation: ade20k, masks (a folder of label maps)."""
    data_path: Free[str | None] = None
    """Where the data set lies: a folder; for --data_set tar and parquet also a URL (s3://, gs://, https://, hf://).
    Credentials come from their usual places, never in the URL."""
    train_split: Free[str] = "train"
    """Folder (or Hugging Face split) of the training images; train finds Training, seg_train and the like, too. Several
    are joined by + (ImageNet-22K in its winter21 layout: imagenet21k_train+imagenet21k_small_classes)."""
    val_split: Free[str] = "val"
    """The same of the validation images; val finds valid, Validation, test, Testing and the like, too."""
    val_per_class: Free[int | None] = None
    """Where there is no validation set: about this many images of each class, at most a tenth of it, are held out from
    training, by a hash of their paths: other images added or removed change nothing."""
    val_share: Free[float | str | None] = None
    """The same as a share of all images: 10% or 0.1."""
    labels: Free[str | None] = None
    """Table of the labels of images in a folder or in tar archives: .csv, .tsv, .jsonl, .json or .parquet with a column
    of paths, one of labels and, if one file serves both, one of splits (train, val). ImageNet's lists of validation
    labels are found without it."""
    label_columns: Free[list[str] | None] = None
    """--labels: names of these columns, [path, label] or [path, label, split]; default: the usual names."""
    label_separator: Free[str | None] = None
    """--labels: what separates several labels of one image (--task multilabel), e.g. "|"; lists, repeated rows and a
    column of 0 and 1 for each class state several, too."""
    label_key: Free[str] = "label"
    """--data_set tar: key of the label in the .json files of WebDataset's or img2dataset's shards."""
    cache_dir: Free[str | None] = None
    """Local folder that keeps shards of a URL, and their index; several runs may share it. Default: the index goes to
    the user's cache folder, and images are read over the network in every pass."""
    cache_size: Free[float] = 100.0
    """GB that the shards in --cache_dir may take; the least recently used one makes room."""
    class_map: Free[str | None] = None
    """File of class names, one a line: only these are used. A second name after a tab is the label's."""
    max_bad: Free[float] = 0.001
    """Share of the images that may be unreadable, but at least 10 files (0: none). Training images are replaced and
    named in bad_files.txt, validation images found and skipped before the first step; beyond it the run stops."""
    num_images: Free[int | None] = None
    """Size of the training set, for plans without data (ImageNet-1K: 1281167)."""
    num_classes: Shape[int | None] = None
    """Number of classes; default: what the data set has (1000 for a plan without data)."""
    num_workers: Free[int] = 8
    """Loader processes of each training process; 0 loads in the training process itself."""
    crop_pct: Learned[float] = 0.875
    """Evaluation: share of the resized image's short side that the centre crop keeps; from 384 px all is squashed."""
    crop_scale: Learned[tuple[float, float]] = (0.08, 1.0)
    """Training: range of the random resized crop's area, as a share of the image's."""
    crop_ratio: Learned[tuple[float, float]] = (3 / 4, 4 / 3)
    """Training: range of the crop's width / height, before it is resized to a square."""
    train_interpolation: Learned[Literal["bicubic", "bilinear", "random"]] = "bicubic"
    """Training: how the crop is resized to the base size; random: one of the two, drawn for each image, as timm's."""
    mean: Learned[tuple[float, float, float] | None] = None
    """By which pixels, in [0, 1], are normalised, per channel; default: what the weights that the run starts from were
    trained with, ImageNet's without any."""
    std: Learned[tuple[float, float, float] | None] = None
    """The deviation that goes with --mean."""
    pipeline: Learned[Literal["exact", "fast"]] = "exact"
    """exact: decode, crop at the base size, augment, reduce; fast: approximations that save decoding time."""
    augment_on: Learned[Literal["host", "device"]] = "host"
    """Where flips and RandAugment run: in the loader's workers, or batched on the device (few CPU cores per GPU)."""
    replay: Planned[list[int] | None] = None
    """For each stage, how often a loaded image is used on average, e.g. [4, 2, 1] (ET++ Section 5.3); default: once.
    Depends on the number of processes, for each replays the images that it loaded."""
    replay_memory: Learned[float] = 4.0
    """GB of main memory for the replay buffer, per process."""


@dataclass(kw_only=True)
class ModelConfig:
    """model"""

    task: Shape[Literal["supervised", "multilabel", "mae", "detection", "segmentation"]] = "supervised"
    """What is learned: one class per image, any number of labels per image (multilabel; from --labels or the .json
    files of tar shards), (mae) to fill in what is masked of an image, for fine-tuning later, boxes and masks of
    objects, or a class for every pixel."""
    model: Shape[str] = "convnext_tiny"
    """A name from the papers (convnext_tiny, deit_small, swin_tiny, ...), any of timm's, or package.module:function."""
    input_size: Planned[int] = 224
    """The full ("base") input size, pixels a side."""
    drop_path: Learned[float] = 0.0
    """Stochastic depth rate of the last block (0 at the first, rising linearly)."""
    model_args: Shape[dict[str, Any] | None] = None
    """More keyword arguments of the model's constructor, e.g. {ls_init_value: 1e-6}."""
    finetune: Learned[str | None] = None
    """Weights to start from: a file (ours or anyone's), a URL or a hub name."""
    linear_probe: Shape[bool | Literal["batchnorm"]] = False
    """Train the classifier alone, on a body that stands still (with --finetune); batchnorm: behind one, as MAE's."""
    head_init_scale: Learned[float] = 1.0
    """Factor on the head's initial weights when fine-tuning gives the model a new head (ConvNeXt: 0.001)."""
    mae_target: Shape[Literal["pixels", "hog"]] = "pixels"
    """--task mae: what is predicted: pixels, normalised within each patch, or histograms of oriented gradients."""
    mask_ratio: Learned[float] = 0.75
    """--task mae: share of the patches that the model does not see."""
    decoder: Shape[tuple[int, int, int]] = (8, 512, 16)
    """--task mae: blocks, width and heads of the decoder, which is thrown away after pre-training."""
    model_ema: Learned[bool] = False
    """Keep an exponential moving average of the weights and evaluate it too."""
    model_ema_decay: Learned[float] = 0.9999
    """Its decay per optimizer step."""
    channels_last: Free[bool] = False
    """channels_last memory format: faster convolutions on CUDA and, in bf16, on CPU."""
    compile: Free[bool] = False
    """torch.compile the model, once per input size."""
    tf32: Learned[bool] = True
    """TensorFloat-32 on CUDA for what is computed in fp32: faster on Ampere and later, 10 bits of mantissa in products.
    What is done to images is computed exactly in any case."""


@dataclass(kw_only=True)
class CurriculumConfig:
    """curriculum"""

    curriculum: Planned[str | dict[str, Any]] = "efficienttrain++"
    """none, efficienttrain, efficienttrain-linear, efficienttrain++, efficienttrain++-convnext, efficienttrain++-deit,
    efficienttrain++-fast, dense-experimental, progressive, a YAML file, or a mapping of the same form
    (docs/method.md)."""
    epochs: Planned[float | str] = 200
    """Budget: passes over the data, or full-size passes' worth of compute under efficienttrain++; or "160000 steps"."""
    warmup_epochs: Learned[float | str] = "5%"
    """Duration of the linear warm-up: 3.7 (epochs of the plan's clock), 20 passes, 20% or 500 steps."""
    magnitude: Planned[Literal["linear", "steps", "constant", "none"] | None] = None
    """RandAugment magnitude; default: the curriculum's (linear; constant for none). none switches RandAugment off."""
    max_magnitude: Planned[float] = 9.0
    """The magnitude at the end, 0 to 10."""
    operator: Planned[Literal["fourier", "lanczos", "bicubic", "bilinear", "nearest"] | None] = None
    """How images are reduced to B; default: the curriculum's (efficienttrain fourier, efficienttrain++ lanczos)."""
    baseline_epochs: Free[float | None] = None
    """Ordinary epochs that printed speed-ups compare with; default: the run's own --epochs."""
    early_large_batch: Planned[bool] = False
    """Larger batches at small sizes, (base/B)^2 rounded to a power of two times --batch_size (ET++ Section 5.3)."""
    lr_rule: Learned[Literal["sqrt", "linear"]] = "sqrt"
    """How the learning rate follows a batch enlarged by --early_large_batch."""


@dataclass(kw_only=True)
class OptimConfig:
    """optimization"""

    batch_size: Learned[int] = 4096
    """Images per optimizer step, over all devices; the result depends on it, so it is the recipe's."""
    micro_batch: Learned[int | Literal["auto"] | None] = None
    """Images per group: what one device takes at the base size. Erasing and mixing happen within a group.
    Default: a device's whole share, if the batch divides, else the largest that nearly does. auto: as many as fit."""
    forward_batch: Learned[dict[int, int] | None] = None
    """Most images of one forward pass, by input size; default: as many groups as cost what one costs at the base size.
    --micro_batch auto finds them and notes them in config.yaml."""
    opt: Stateful[str] = "adamw"
    """Optimizer, by timm's names: adamw, lamb, sgd, ...; muon: for matrices, AdamW for stem, head, embeddings and
    vectors (training/muon.py)."""
    lr: Learned[float] = 4e-3
    """Peak learning rate, for --batch_size as it stands (no hidden scaling)."""
    min_lr: Learned[float] = 1e-6
    """Learning rate at the end of a cosine or polynomial schedule."""
    schedule: Learned[Literal["cosine", "steps", "poly"]] = "cosine"
    """Learning rate after warm-up: a cosine, a tenth after each of --lr_steps, or linear to --min_lr (poly)."""
    lr_steps: Learned[list[float | str] | None] = None
    """--schedule steps: durations after which the learning rate falls, e.g. [8, 11] (epochs of the plan's clock)."""
    weight_decay: Learned[float] = 0.05
    """Weight decay of matrices; biases, norms and what the model names have none."""
    weight_decay_end: Learned[float | None] = None
    """Weight decay at the end of a cosine; default: constant."""
    opt_eps: Stateful[float | None] = None
    """Optimizer's epsilon; default: the optimizer's own."""
    opt_betas: Stateful[tuple[float, float] | None] = None
    """Adam's or LAMB's betas; default: (0.9, 0.999), (0.9, 0.95) of what AdamW trains beside Muon."""
    momentum: Stateful[float | None] = None
    """SGD's or Muon's momentum; default: 0.9, Muon's 0.95."""
    fallback_lr_scale: Learned[float | None] = None
    """--opt muon: learning rate of what AdamW trains (stem, head, embeddings, vectors), relative to the matrices'.
    Default: 0.1 for a model with BatchNorm, 1 without (docs/frontier.md)."""
    layer_decay: Stateful[float] = 1.0
    """Learning rate factor per layer, counted from the head (fine-tuning); 1 is off."""
    clip_grad: Learned[float | None] = None
    """Clip the gradient's global norm, with and without --amp."""
    amp: Learned[Literal["none", "bf16", "fp16"]] = "none"
    """Automatic mixed precision; fp16 comes with a gradient scaler."""


@dataclass(kw_only=True)
class AugmentConfig:
    """regularization (after RandAugment)"""

    mixup: Learned[float] = 0.8
    """Mixup's alpha; 0 is off."""
    cutmix: Learned[float] = 1.0
    """CutMix's alpha; 0 is off."""
    mixup_prob: Learned[float] = 1.0
    """Probability that a group of images is mixed at all."""
    mixup_switch_prob: Learned[float] = 0.5
    """Probability of CutMix when both are on."""
    smoothing: Learned[float] = 0.1
    """Label smoothing (--task supervised)."""
    reprob: Learned[float] = 0.25
    """Probability of random erasing."""
    hflip: Learned[float] = 0.5
    """Probability of a horizontal flip."""
    color_jitter: Learned[float] = 0.0
    """Brightness, contrast and saturation are scaled by factors up to this far from 1, before RandAugment; 0 is off.
    (In timm and ConvNeXt it is ignored where RandAugment runs; --magnitude none switches that off.)"""


@dataclass(kw_only=True)
class DenseConfig:
    """detection and segmentation"""

    head: Shape[Literal["retinanet", "mask_rcnn", "cascade", "upernet"] | None] = None
    """What stands on the body; default: mask_rcnn for --task detection, upernet for segmentation."""
    head_args: Shape[dict[str, Any] | None] = None
    """More settings of the head, e.g. {channels: 64, width: 256}; {masks: false} for boxes alone."""
    train_sides: Learned[list[int] | None] = None
    """Detection: short sides of training images, one drawn for each; default: 480, 512, ..., 800."""
    max_side: Learned[int | None] = None
    """Longest side of training and test images; default: 1333 in detection, 2048 in segmentation."""
    test_side: Learned[int | None] = None
    """Short side of test images; default: 800 in detection, 512 in segmentation."""
    crop: Planned[int] = 512
    """Segmentation: side of the square that is cut out of a training image."""
    crop_prob: Learned[float] = 0.5
    """Detection: share of training images of which a part is cut out before they are resized."""
    scales_test: Free[list[float] | None] = None
    """--eval of segmentation: mean over the image at these sizes, e.g. [0.5, 0.75, 1, 1.25, 1.5, 1.75]."""
    flip_test: Free[bool] = False
    """--eval of segmentation: mean over the image and its mirror image."""


GROUPS = (RunConfig, DataConfig, ModelConfig, CurriculumConfig, OptimConfig, AugmentConfig, DenseConfig)


@dataclass(kw_only=True)
class Config(DenseConfig, AugmentConfig, OptimConfig, CurriculumConfig, ModelConfig, DataConfig, RunConfig):
    """All settings of a run (a dataclass lists the fields of its last base first)."""
