"""Detectors and segmenters as graphs: the same detections as the model's, traced, and by onnxruntime."""

import pytest
import torch
from torch import nn

from dense import export
from dense.build import make_dense
from dense.graphs import DetectorGraph, SegmenterGraph
from models.weights import Report

SIZE = (96, 128)


def model_of(head):
    """A small model whose scores differ clearly from box to box."""
    torch.manual_seed(0)
    options = {"channels": 16, "width": 16, "sampled": 16} if head in ("mask_rcnn", "cascade") else {"channels": 16}
    options = {"width": 16, "auxiliary_width": 8} if head == "upernet" else options
    model = make_dense(head, "resnet18", 3, options=options).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and ("cls_score" in name or "cls_logits" in name):
            nn.init.normal_(parameter, std=0.3)
    if head == "retinanet":
        nn.init.zeros_(model.head.classification_head.cls_logits.bias)
    return model


@pytest.mark.parametrize("head", ["retinanet", "cascade"])
def test_a_graph_finds_what_the_model_finds(head):
    model, images = model_of(head), torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    graph = DetectorGraph(model)
    with torch.no_grad():
        (expected,) = model(images, torch.tensor([SIZE]))
        found = dict(zip(graph.names, graph(images)))
    count = len(expected["scores"])
    assert count > 20
    torch.testing.assert_close(found["scores"][:count], expected["scores"], rtol=1e-4, atol=1e-4)
    assert (found["scores"][count:] == 0).all()
    # Rows of equal scores may change places.
    scores = expected["scores"]
    apart = torch.cat([scores.new_ones(1), scores[:-1] - scores[1:]]) > 2e-6
    apart &= torch.cat([apart[1:], apart.new_ones(1)])
    assert apart.sum() > 5
    for name in graph.names[:1] + graph.names[2:]:
        torch.testing.assert_close(found[name][:count][apart], expected[name][apart], rtol=1e-3, atol=1e-3)


def detections():
    """Twelve of them, the last four rows empty, the scores of rows 2 to 5 alike."""
    generator = torch.Generator().manual_seed(0)
    corners = 60 * torch.rand(16, 2, generator=generator)
    scores = torch.linspace(0.9, 0.2, 16)
    scores[2:6], scores[12:] = 0.7, 0
    return {
        "boxes": torch.cat([corners, corners + 30], 1),
        "scores": scores,
        "labels": torch.arange(16) % 3,
        "masks": torch.rand(16, 28, 28, generator=generator),
    }


def test_ties_may_come_in_another_order_and_empty_rows_hold_anything():
    expected, order = detections(), torch.tensor([0, 1, 5, 3, 2, 4, *range(6, 16)])
    found = {name: value[order].clone() for name, value in expected.items()}
    found["boxes"][12:] += 50
    assert export.disagreement(found, expected, 128) == 0
    found["scores"] += 2e-5 * (found["scores"] > 0)
    assert export.disagreement(found, expected, 128) == pytest.approx(2e-5, rel=0.01)


@pytest.mark.parametrize(
    ("name", "change", "difference"),
    [
        ("boxes", lambda x: x[:, 1].add_(1.28), 0.01),
        ("boxes", lambda x: x[8].add_(2.56), 0.02),
        ("boxes", lambda x: x[3].fill_(float("nan")), float("nan")),
        ("masks", lambda x: x[3, 5, 5].sub_(0.5), 0.5),
        ("labels", lambda x: x[4].add_(1), float("inf")),
        ("scores", lambda x: x[8].add_(0.01), float("inf")),
        ("scores", lambda x: x[11].zero_(), float("inf")),
    ],
)
def test_another_box_label_mask_or_score_is_a_difference(name, change, difference):
    expected, found = detections(), detections()
    change(found[name])
    assert export.disagreement(found, expected, 128) == pytest.approx(difference, rel=0.01, nan_ok=True)


def test_a_list_that_is_full_may_cut_its_last_ties_elsewhere():
    expected = {name: value[:12] for name, value in detections().items()}
    expected["scores"][9:] = 0.3
    found = {name: value.clone() for name, value in expected.items()}
    found["boxes"][9:] += 40
    assert export.disagreement(found, expected, 128) == 0
    found["boxes"][8] += 40  # negative control: no tie
    assert export.disagreement(found, expected, 128) > 0.3


@pytest.mark.parametrize(("fault", "message"), [("masks", "is 0.5 off the model"), ("labels", "finds other objects")])
def test_a_graph_that_finds_something_else_is_not_written(fault, message, monkeypatch, tmp_path):
    def wrong(program, path, about, names):
        run = real(program, path, about, names)
        place, change = names.index(fault), 0.5 if fault == "masks" else 1
        return lambda images: [x + change * (k == place) for k, x in enumerate(run(images))]

    real, model, out = export._torch, model_of("mask_rcnn"), tmp_path / "graph.pt2"
    said = export._write_graph(model, out, "torch_export", SIZE, "abc", Report("a", "b", "model"))
    assert "-> boxes, scores, labels, masks; agrees with the model to 0 on 100 detections" in said
    monkeypatch.setattr(export, "_torch", wrong)
    with pytest.raises(ValueError, match=message):
        export._write_graph(model, out, "torch_export", SIZE, "abc", Report("a", "b", "model"))


@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn", "upernet"])
def test_torch_export_traces_it(head):
    model, images = model_of(head), torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    graph = SegmenterGraph(model) if head == "upernet" else DetectorGraph(model)
    program = torch.export.export(graph, (images,), strict=False)
    other = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found, expected = program.module()(other), graph(other)
    for one, two in zip(found, expected) if head != "upernet" else [(found, expected)]:
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.extended
@pytest.mark.parametrize("head", ["retinanet", "upernet"])
def test_onnxruntime_runs_it(head, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, images = model_of(head), torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    graph = SegmenterGraph(model) if head == "upernet" else DetectorGraph(model)
    program = torch.export.export(graph, (images,), strict=False)
    torch.onnx.export(program, (), dynamo=True, verbose=False).save(str(tmp_path / "graph.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = graph(images)
    for one, two in zip(found, expected if head != "upernet" else (expected,)):
        torch.testing.assert_close(torch.from_numpy(one), two, rtol=1e-3, atol=1e-3)
