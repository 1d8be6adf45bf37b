"""A training loop with the structure and the names of timm's train.py, of timm's own parts; docs/own_loop.md's patch is
inserted into it. It prints one JSON line: input sizes and learning rates by update."""

import argparse
import json
from contextlib import suppress

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data_dir")
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.01)
    args = parser.parse_args()
    args.seen = []
    device = torch.device("cpu")

    sized = {"img_size": 64} if "vit" in args.model else {}
    model = create_model(args.model, num_classes=3, **sized)
    data_config = resolve_data_config({"input_size": (3, 64, 64)}, model=model)
    next(model.children()).register_forward_pre_hook(
        lambda _, images: None if images[0].is_meta else args.seen.append([images[0].shape[-1]])
    )
    model.to(device=device)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr)
    model_ema = ModelEmaV3(model, decay=0.9)

    dataset_train = create_dataset("", root=args.data_dir, split="train", is_training=True)
    loader_train = create_loader(
        dataset_train,
        input_size=data_config["input_size"],
        batch_size=args.batch_size,
        is_training=True,
        use_prefetcher=False,
        mean=data_config["mean"],
        std=data_config["std"],
        num_workers=0,
        device=device,
    )
    updates_per_epoch = len(loader_train)
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=args.epochs, updates_per_epoch=updates_per_epoch, step_on_epochs=False
    )
    start_epoch = 0
    for epoch in range(start_epoch, num_epochs):
        train_one_epoch(epoch, model, loader_train, optimizer, nn.CrossEntropyLoss(), args, lr_scheduler, model_ema)
        lr_scheduler.step(epoch + 1, None)
    print(json.dumps(args.seen))


def train_one_epoch(
    epoch, model, loader, optimizer, loss_fn, args, lr_scheduler=None, model_ema=None, amp_autocast=suppress
):
    model.train()
    updates_per_epoch = len(loader)
    num_updates = epoch * updates_per_epoch
    for batch_idx, (input, target) in enumerate(loader):
        with amp_autocast():
            loss = loss_fn(model(input), target)
        loss.backward()
        optimizer.step()
        args.seen[-1] += [batch_idx, optimizer.param_groups[0]["lr"]]
        num_updates += 1
        optimizer.zero_grad()
        model_ema.update(model)
        lr_scheduler.step_update(num_updates=num_updates, metric=loss.item())


if __name__ == "__main__":
    main()
