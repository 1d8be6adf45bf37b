"""Weights of mmdetection's, mmsegmentation's and Swin's layouts: every name and shape has its place, both ways."""

import mmdetection_names as theirs
import pytest
import torch

from curriculum.skeleton import Skeleton
from dense.backbones import make_body
from dense.detectors import RETINANET_STRIDES, cascade_mask_rcnn, mask_rcnn, retinanet
from dense.upernet import upernet
from dense.weights import load_dense, to_ours, to_theirs

SWIN = (96, (2, 2, 6, 2), (3, 6, 12, 24))
CHANNELS = [96, 192, 384, 768]


def swin_pair(kind: str, official: bool):
    """(their model, ours) on the meta device, of COCO's or ADE20K's classes."""
    backbone = (theirs.swin_of_authors if official else theirs.swin_of_mmdetection)(*SWIN)
    if kind == "retinanet":
        del backbone.norm0  # made for the three maps that are used
        body = make_body("swin_tiny", strides=RETINANET_STRIDES)
        return theirs.retinanet(backbone, CHANNELS[1:], 80), retinanet(body, 80)
    body = make_body("swin_tiny")
    if kind == "upernet":
        return theirs.upernet(backbone, CHANNELS, 150, 2), upernet(body, 150)
    make = cascade_mask_rcnn if kind == "cascade" else mask_rcnn
    return theirs.two_stage(backbone, CHANNELS, 80, kind == "cascade"), make(body, 80)


def shapes(state) -> dict:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def without_index(state) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.endswith("relative_position_index")}


@pytest.mark.parametrize("official", [True, False], ids=["authors", "mmdetection"])
@pytest.mark.parametrize("kind", ["cascade", "mask_rcnn", "retinanet", "upernet"])
def test_every_name_and_shape_of_theirs_is_one_of_ours_and_back(kind, official):
    with torch.device("meta"), Skeleton():
        foreign, model = swin_pair(kind, official)
        _, ours = to_ours(foreign.state_dict())
        assert shapes(ours) == shapes(model.state_dict())
        back = to_theirs(model.state_dict(), "authors" if official else "mmdetection")
    assert shapes(without_index(back)) == shapes(without_index(foreign.state_dict()))


def test_vit_of_mmsegmentation_maps_too():
    with torch.device("meta"), Skeleton():
        foreign = theirs.upernet(theirs.vit_of_mmsegmentation(384, 12, 197), [384] * 4, 150, 3)
        model = upernet(make_body("deit_small"), 150)
        _, ours = to_ours(foreign.state_dict())
        assert shapes(ours) == shapes(model.state_dict())
        back = to_theirs(model.state_dict(), "mmdetection")
    assert shapes(back) == shapes(foreign.state_dict())


def test_downsampling_is_reordered_to_what_an_unfold_gives():
    """mmdetection's Swin joins 2 x 2 tokens by nn.Unfold: the same weights must give the same map in both orders."""
    torch.manual_seed(0)
    weight, norm = torch.randn(6, 4 * 3), torch.randn(4 * 3)
    start = {"stages.0.blocks.0.attn.w_msa.qkv.weight": torch.zeros(1), "stages.0.downsample.reduction.weight": weight}
    state = {f"backbone.{name}": tensor for name, tensor in start.items()}
    _, ours = to_ours({**state, "backbone.stages.0.downsample.norm.weight": norm})
    x = torch.randn(1, 3, 4, 6)
    unfolded = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
    expected = (unfolded * norm) @ weight.T
    tokens = x.permute(0, 2, 3, 1)
    joined = torch.cat([tokens[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1).flatten(1, 2)
    found = (joined * ours["body.model.layers.1.downsample.norm.weight"]) @ ours[
        "body.model.layers.1.downsample.reduction.weight"
    ].T
    torch.testing.assert_close(found, expected)
    assert not torch.allclose((joined * norm) @ weight.T, expected)  # the order matters


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return mask_rcnn(make_body("resnet18"), 5, channels=16, width=32)


def fresh(classes: int = 5):
    return mask_rcnn(make_body("resnet18"), classes, channels=16, width=32)


def test_a_detector_loads_whole_from_our_names_and_from_theirs(small, tmp_path):
    for name, state in (("ours", small.state_dict()), ("theirs", to_theirs(small.state_dict()))):
        path = tmp_path / f"{name}.pth"
        torch.save({"state_dict": state, "meta": {"epoch": 12}}, path)
        model = fresh()
        report = load_dense(model, path)
        assert not report.random and not report.dropped
        for key, tensor in small.state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor), key


def test_another_number_of_classes_leaves_the_layers_that_predict_them_random(small, tmp_path):
    torch.save({"model": small.state_dict()}, tmp_path / "w.pth")
    model = fresh(classes=3)
    report = load_dense(model, tmp_path / "w.pth")
    layers = {name.rpartition(".")[0].rpartition(".")[2] for name in report.random}
    assert layers == {"cls_score", "bbox_pred", "mask_fcn_logits"}
    assert torch.equal(model.fpn.inner_blocks[0][0].weight, small.fpn.inner_blocks[0][0].weight)


def test_a_classifier_loads_into_the_body(tmp_path):
    from models import create_model

    torch.manual_seed(1)
    classifier = create_model("resnet18", 10)
    torch.save({"model": classifier.state_dict()}, tmp_path / "w.pth")
    model = fresh()
    report = load_dense(model, tmp_path / "w.pth")
    assert torch.equal(model.body.model.layer4[1].conv2.weight, classifier.layer4[1].conv2.weight)
    assert "fpn.inner_blocks.0.0.weight" in report.random


def test_what_does_not_fit_is_refused_and_named(small, tmp_path):
    state = small.state_dict()
    state.pop("rpn.head.cls_logits.bias")
    torch.save({"model": state}, tmp_path / "w.pth")
    model = fresh()
    before = model.body.model.conv1.weight.clone()
    with pytest.raises(ValueError, match=r"rpn\.head\.cls_logits\.bias missing"):
        load_dense(model, tmp_path / "w.pth")
    assert torch.equal(model.body.model.conv1.weight, before)
