"""Detectors and segmenters as graphs: the same detections as the model's, traced, and by onnxruntime."""

import pytest
import torch
from torch import nn

from dense.build import make_dense
from dense.graphs import DetectorGraph, SegmenterGraph

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
