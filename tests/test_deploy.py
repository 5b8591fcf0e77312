"""``timm-vix export``: what a file computes, how int8 is quantised, and what is said where there can be no file."""

import argparse
import copy
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.ImageOps
import pytest
import timm
import torch
from conftest import DEIT, PLAIN, condition, distance, exit_code, lively, load_example, rounding, since, small, vit
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

import timm_vix
from timm_vix._checks import InputError
from timm_vix._records import key_of, read_records
from timm_vix.data.folders import labelled_folder
from timm_vix.deploy import export, export_command
from timm_vix.deploy.check import accuracy, open_labelled, parity, read_calibration
from timm_vix.deploy.classifier import Classifier
from timm_vix.deploy.formats import cannot_hold, needs, operator_of
from timm_vix.deploy.serve import number_of_parameters

SPEC = "vix_axial_cifar img_size=(14,10) patch_size=2 embed_dim=32 depth=1 num_heads=2 num_classes=5"
CONFIG = dict(
    input_size=(3, 14, 10), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, crop_mode="center"
)

# what torch and the runtimes deprecate, inside their exporters
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    since("2.9", "exports not all mixers"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images in each of five class folders."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label in range(5):
        (folder / f"class{label}").mkdir()
        for number in range(4):
            pixels = generator.integers(0, 255, (14, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.png")
    return folder


def command(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    export_command.add_arguments(parser)
    return parser.parse_args([str(one) for one in arguments])


def calibration(model: nn.Module, count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, *model.patch_embed.img_size)


def test_the_command_writes_what_the_weights_compute(tmp_path: Path, photos: Path, capsys) -> None:
    name, *parts = SPEC.split()
    given = timm_arguments(parts)
    model = timm.create_model(name, **given).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    out = tmp_path / "model.pt2"
    options = ["--to", "pt2", "--weights", tmp_path / "weights.safetensors", "--rounds", 1, "--threads", 1]
    export_command.main(command(SPEC, *options, "--out", out, "--data-dir", photos))
    printed = capsys.readouterr().out
    (call,) = (line for line in printed.splitlines() if line.startswith("it is opened by "))
    program = eval(call.removeprefix("it is opened by "), {"torch": torch})
    for batch in (1, 4):  # 4 is none of the sizes that the command itself compares
        x = torch.randn(batch, 3, 14, 10)
        assert distance(program(x), model(x)) < rounding(torch.float32)
    assert "images 1x3x14x10" in printed and "images 3x3x14x10" in printed
    (words,) = (line for line in printed.splitlines() if line.startswith("its images are prepared by "))
    preparing, classes = words.removeprefix("its images are prepared by ").split("; its classes are ")
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter to the right
    with Image.open(photos / "class0" / "0.png") as image:
        image.convert("RGBA").save(tmp_path / "photos" / "0.png", exif=exif)
    with Image.open(tmp_path / "photos" / "0.png") as image:
        prepared = eval(preparing, {"timm": timm, "PIL": PIL, "image": image}).unsqueeze(0)
    assert torch.equal(prepared, read_calibration(tmp_path / "photos", 1, export.build(SPEC, options[3])[1]))
    shutil.rmtree(tmp_path / "photos")
    assert classes == "0, 1 to 4, 5 in all"
    assert "the same answer on 100.00 % of 20 images" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"weights.safetensors", "model.pt2"}


def test_the_command_counts_as_many_images_as_were_asked_for(tmp_path: Path, photos: Path, capsys) -> None:
    torch.manual_seed(0)
    model = lively(timm.create_model(SPEC.split()[0], **timm_arguments(SPEC.split()[1:])).eval())
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    options = ["--to", "pt2", "--weights", tmp_path / "weights.safetensors", "--rounds", 1, "--threads", 1]
    export_command.main(command(SPEC, *options, "--out", tmp_path / "model.pt2", "--data-dir", photos, "--limit", 7))
    _, config = export.build(SPEC, str(tmp_path / "weights.safetensors"))
    transform, right = timm.data.create_transform(**config), 0
    for i in range(7):  # spread over the twenty
        label, number = divmod(i * 20 // 7, 4)
        with Image.open(photos / f"class{label}" / f"{number}.png") as image, torch.no_grad():
            right += int(model(transform(image).unsqueeze(0)).argmax()) == label
    printed = capsys.readouterr().out
    assert f"top-1 {100 * right / 7:.2f} %, eager {100 * right / 7:.2f} %" in printed and "of 7 images" in printed


def read_by(to: str, path: Path) -> dict[str, str]:
    """The metadata of a file, read by the Python that the command prints."""
    pytest.importorskip(dict(onnx="onnxruntime", openvino="openvino").get(to, "torch"))
    names = {"torch": torch, **{name: sys.modules.get(name) for name in ("onnxruntime", "openvino")}}
    code = export_command.metadata_read_by(to, path)
    if to != "pt2":
        return eval(code, names)
    exec(code, names)
    return json.loads(names["extra"]["metadata.json"])


@pytest.mark.parametrize(
    "to, dtype",
    [
        ("onnx", "float32"),
        pytest.param("onnx", "int8", marks=pytest.mark.slow),
        ("openvino", "float32"),
        pytest.param("openvino", "bfloat16", marks=pytest.mark.slow),
        pytest.param("openvino", "int8", marks=pytest.mark.slow),
        ("pt2", "float32"),
        pytest.param("aoti", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_file_says_how_its_images_are_prepared_and_what_its_classes_are(to, dtype, photos, tmp_path) -> None:
    for library in dict(onnx=["onnxruntime"], openvino=["onnxruntime", "openvino"]).get(to, []):
        pytest.importorskip(library)
    if (to, dtype) == ("openvino", "int8"):
        pytest.importorskip("nncf")
    model = lively(small("softmax", depth=1))
    model.pretrained_cfg = dict(model.pretrained_cfg, label_names=["a cat", "ein Bär", "x", 'a "y"', "z"])
    out = tmp_path / f"a file{export.SUFFIXES[to]}"
    images = read_calibration(photos, 20, CONFIG)
    calibrating = images if dtype == "int8" else None
    export.export_model(model, CONFIG, to, dtype, out, calibrating, threads=1, note="its weights")
    found = {name: json.loads(text) for name, text in read_by(to, out).items() if not name.startswith("AOTI")}
    assert found.pop("classes") == ["a cat", "ein Bär", "x", 'a "y"', "z"]
    assert found.pop("note") == "its weights" and found.pop("parameters") == sum(p.numel() for p in model.parameters())
    assert found.pop("dtype") == dtype and found.pop("architecture") == model.pretrained_cfg["architecture"]
    assert found == {name: list(value) if isinstance(value, tuple) else value for name, value in CONFIG.items()}
    if out.suffix == ".pt2":
        with pytest.raises(
            InputError, match=r"a file.pt2: expected a file that ends in .onnx or .xml; .pt2 holds code"
        ):
            Classifier(str(out))
        return
    classifier, photo = Classifier(str(out)), photos / "class3" / "1.png"
    assert classifier.note == "its weights" and number_of_parameters(classifier.net) > 1000
    assert classifier.names == ["a cat", "ein Bär", "x", 'a "y"', "z"] and classifier.size == [14, 10]
    pixels = classifier.prepare(photo)
    assert torch.equal(pixels, read_calibration(photo.parent, 4, CONFIG)[1:2])
    shares, expected = classifier.best(pixels, 5), model(pixels).softmax(1)[0]
    for name, share in zip(classifier.names, expected.tolist()):
        assert shares[name] == pytest.approx(share, abs=1e-4 if dtype == "float32" else 0.1)


def test_a_file_that_is_no_export_is_named(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "file.onnx"
    with pytest.raises(InputError, match=r"file.onnx is not there; allowed is .*timm-vix export \(.onnx or .xml\)"):
        Classifier(str(file))
    file.write_bytes(b"no model")
    with pytest.raises(InputError, match="file.onnx cannot be opened as a model: .*") as error:
        Classifier(str(file))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="file.onnx is an exported file, which takes no img_size"):
        Classifier(f"{file} img_size=32")
    (tmp_path / "weights.pth").touch()
    with pytest.raises(InputError, match="weights.pth is a file; weights are given by --weights FILE; allowed here"):
        Classifier(str(tmp_path / "weights.pth"))
    torch.onnx.export(nn.Linear(3, 2).eval(), (torch.zeros(1, 3),), file, dynamo=True, verbose=False)
    with pytest.raises(InputError, match="file.onnx has no architecture in its metadata; expected a file of timm-vix"):
        Classifier(str(file))


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("classes", 5, "metadata that cannot be used: TypeError"),
        ("classes", ["one"], "5 outputs, and names of 1 classes"),
        ("input_size", None, "metadata that cannot be used: TypeError"),
        ("input_size", [3], "metadata that cannot be used: "),
        ("interpolation", "foo", "metadata that cannot be used: KeyError 'foo'"),
        ("mean", "x", "metadata that cannot be used: "),
        ("parameters", "x", "metadata that cannot be used: .*parameters='x': expected an integer"),
        ("parameters", None, "metadata that cannot be used: .*parameters=None: expected an integer"),
    ],
)
def test_metadata_of_another_program_are_named(exported_pool: Path, name: str, value: object, words: str) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(exported_pool)
    entries = {entry.key: entry.value for entry in model.metadata_props} | {name: json.dumps(value)}
    onnx.helper.set_model_props(model, entries)
    onnx.save(model, exported_pool.with_name("edited.onnx"))
    with pytest.raises(InputError, match=words) as error:
        Classifier(str(exported_pool.with_name("edited.onnx")))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def exported_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    out = tmp_path_factory.mktemp("exported") / "pool.onnx"
    export.export_model(small("pool", depth=1), CONFIG, "onnx", "float32", out, threads=1)
    return out


def timm_arguments(parts: list[str]) -> dict:
    from timm_vix._names import parse_model

    return parse_model(" ".join(["vix_axial_cifar", *parts]))[1]


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["softmax", "nystrom"])  # the second one solves, too
def test_int8_in_onnx_is_symmetric_by_channel_and_only_where_weights_are(mixer: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = small(mixer, depth=1)
    images = calibration(model)
    run, _ = export.export_model(model, CONFIG, "onnx", "int8", tmp_path / "m.onnx", images, threads=1)
    graph = onnx.load(tmp_path / "m.onnx").graph
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    weights, rounded = [], {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            both = [rounded[name] for name in node.input[:2] if name in rounded]
            assert len(both) in (0, 2), "a layer is rounded as a whole"
            assert not both or any(one.input[0] in constants for one in both), "no product of two activations is"
        if node.op_type == "DequantizeLinear":
            assert readers[node.output[0]] - {"Shape"} <= {"MatMul", "Gemm", "Conv"}
            if node.input[0] in constants and constants[node.input[0]].dtype == np.int8:
                (axis,) = (attribute.i for attribute in node.attribute if attribute.name == "axis")
                weights.append([*(constants[name] for name in node.input), axis])
    # Nyström multiplies its landmarks by parts of the weights, head by head
    assert weights if mixer == "nystrom" else sorted(s.size for _, s, *_ in weights) == widths_of_linear_layers(model)
    for values, scale, zero, axis in weights:
        # symmetric, and each output channel reaches the largest integer
        assert scale.size == values.shape[axis] and not zero.any()
        largest = np.abs(np.moveaxis(values.astype(int), axis, 0).reshape(scale.size, -1)).max(1)
        assert (largest >= 127).all()
    expected = model(images).detach()
    assert 0 < distance(run(images), expected) < 0.1


def widths_of_linear_layers(model: nn.Module) -> list[int]:
    """Output channels of what int8 rounds in a model of one block."""
    block = model.blocks[0]
    layers = [block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2, model.patch_embed.proj, model.head]
    return sorted(len(layer.weight) for layer in layers)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["softmax", "nystrom"])  # the second one solves, too
def test_int8_in_openvino_is_symmetric_by_channel_and_only_where_weights_are(mixer: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    model = small(mixer, depth=1)
    export.export_model(model, CONFIG, "openvino", "int8", tmp_path / "m.xml", calibration(model), threads=1)
    channels = []
    for node in openvino.Core().read_model(tmp_path / "m.xml").get_ops():
        readers = [place.get_node() for output in node.outputs() for place in output.get_target_inputs()]
        if node.get_type_name() == "FakeQuantize":
            assert {reader.get_type_name() for reader in readers} - {"ShapeOf"} <= {"MatMul", "Convolution"}
        if node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.i8:
            (convert,) = readers
            (scaled,) = (place.get_node() for place in convert.output(0).get_target_inputs())
            # no zero point is subtracted before
            assert (convert.get_type_name(), scaled.get_type_name()) == ("Convert", "Multiply")
            channels.append(scaled.input_value(1).get_node().data.size)
            assert np.abs(node.data.astype(int)).max() >= 63  # the first layer is kept from overflow
    # Nyström multiplies its landmarks by parts of the weights, head by head
    assert channels if mixer == "nystrom" else sorted(channels) == widths_of_linear_layers(model)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["softmax", "nystrom"])
def test_int8_in_pt2_is_symmetric_by_channel_and_only_where_weights_are(mixer: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao.quantization.pt2e")
    model = small(mixer, depth=1)
    export.export_model(model, CONFIG, "pt2", "int8", tmp_path / "m.pt2", calibration(model), threads=1)
    program = torch.export.load(tmp_path / "m.pt2")
    assert not [node for node in program.graph.nodes if node.op == "placeholder" and not node.users]
    constants = dict(program.named_buffers())
    # Nyström multiplies its landmarks by parts of the weights, which stay as they are
    stored = sum(one.nbytes for one in program.state_dict.values())
    assert stored < (0.9 if mixer == "nystrom" else 0.7) * sum(one.nbytes for one in model.parameters())
    buffers = program.graph_signature.inputs_to_buffers
    channels = []
    for node in program.graph.nodes:
        if "dequantize" not in str(node.target):
            continue
        assert {str(reader.target) for reader in node.users} <= {"aten.linear.default", "aten.conv2d.default"}
        if "channel" in str(node.target):
            values, scale, zero = (constants[buffers[argument.name]] for argument in node.args[:3])
            assert values.dtype == torch.int8 and not zero.any()
            assert (values.int().flatten(1).abs().amax(1) >= 127).all()
            channels.append(scale.numel())
    # Nyström multiplies its landmarks by parts of the weights, head by head
    assert channels if mixer == "nystrom" else sorted(channels) == widths_of_linear_layers(model)


def test_parity_finds_another_function() -> None:
    model = small("softmax", depth=1)
    x = torch.randn(2, 3, 14, 10)

    def wrong(images: torch.Tensor) -> torch.Tensor:
        return model(images) + 0.1 * torch.eye(2, 5)

    (row,) = parity(model, wrong, [x], "int8")
    assert row["error"] == pytest.approx(0.1, rel=1e-4)
    with pytest.raises(InputError, match="differs from eager by 0.1") as error:
        parity(model, wrong, [x], "float32")
    assert "no file is written" in str(error.value)
    with pytest.raises(InputError, match="the model itself gives logits that aren't finite"):
        parity(lambda images: model(images) * float("nan"), model, [x], "float32")
    with pytest.raises(InputError, match="nan"):
        parity(model, lambda images: model(images) * float("nan"), [x], "int8")
    parity(model, lambda images: 0.1 * model(images), [x], "int8")
    with pytest.raises(InputError, match="int8 is too coarse .* more images for --calibrate"):  # farther off than zeros
        parity(model, lambda images: -0.1 * model(images), [x], "int8")
    with pytest.raises(InputError, match=r"outputs of \(2, 4\), eager \(2, 5\)"):
        parity(model, lambda images: model(images)[:, :4], [x], "int8")


@pytest.mark.parametrize("rounding_error, allowed", [(0.01, 0.14), (0.1, 0.29), (0.5, 0.99)])
def test_in_bfloat16_a_file_is_not_much_farther_off_than_eager_mode(rounding_error: float, allowed: float) -> None:
    model = small("softmax", depth=1)
    x = torch.randn(2, 3, 14, 10)

    def off_by(share: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda images: (1 - share) * model(images)

    parity(model, off_by(allowed), [x], "bfloat16", off_by(rounding_error))
    with pytest.raises(
        InputError, match="bfloat16 is too coarse for it here, so no file is written; try another --dty"
    ):
        parity(model, off_by(allowed + 0.02), [x], "bfloat16", off_by(rounding_error))


@pytest.mark.slow
def test_a_runtime_that_solves_in_bfloat16_gets_no_nystrom_attention(tmp_path: Path, deit: Path) -> None:
    """OpenVINO computes everything in bfloat16, and the equations of the landmarks need more."""
    pytest.importorskip("openvino")
    spec = "vix_from_timm source=deit_tiny_patch16_224 mixer=nystrom"
    model, config = export.build(spec, str(deit))
    with pytest.raises(InputError, match="bfloat16 is too coarse for it here"):
        export.export_model(model, config, "openvino", "bfloat16", tmp_path / "model.xml", threads=1)
    assert not list(tmp_path.iterdir())


def test_of_calibration_images_a_tenth_is_held_out_and_told(tmp_path: Path, monkeypatch) -> None:
    model, images = small("softmax", depth=1), torch.randn(30, 3, 14, 10)
    given, compared = [], []
    monkeypatch.setattr(export, "write", lambda *all: (given.append(all[5]), all[4].write_bytes(b"nothing")))
    monkeypatch.setitem(export.OPEN, "pt2", lambda *_: lambda x: compared.append(x) or model(x))
    _, found = export.export_model(model, CONFIG, "pt2", "int8", tmp_path / "m.pt2", images, threads=1)
    assert torch.equal(compared[-1], images[[0, 10, 20]])
    assert torch.equal(given[0], images[[i for i in range(30) if i % 10]])
    assert found["parity"][-1]["same"] == 3
    assert "int8 changes" not in export_command.describe("m", tmp_path / "m.pt2", "pt2", "int8", found)
    found["parity"][-1]["same"] = 2
    assert "int8 changes more answers than it should" in export_command.describe("m", tmp_path, "pt2", "int8", found)


@pytest.mark.slow
def test_what_openvino_is_opened_by_computes_in_the_dtype_of_the_file(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model = small("nystrom", depth=1)
    run, _ = export.export_model(model, CONFIG, "openvino", "float32", tmp_path / "m.xml", threads=1)
    compiled = eval(export_command.opened_by("openvino", "float32", tmp_path / "m.xml"), {"openvino": openvino})
    x = torch.randn(4, 3, 14, 10)
    assert np.abs(compiled(x.numpy())[0] - run(x).numpy()).max() < 1e-5
    assert '"bf16"' in export_command.opened_by("openvino", "bfloat16", tmp_path / "m.xml")


@pytest.mark.parametrize(
    "keywords, to, words",
    [
        (dict(mixer="nystrom"), "onnx", "mixer='nystrom': blocks.0.attn counts the patches of one grid"),
        (dict(mixer="axial"), "pt2", "mixer='axial': blocks.0.attn counts the patches of one grid"),
        (dict(mixer="atrous"), "onnx", "mixer='atrous': blocks.0.attn counts the patches of one grid"),
        (dict(mixer="legendre"), "onnx", "mixer='legendre': blocks.0.attn counts the patches of one grid"),
        (dict(mixer="relu"), "pt2", "mixer='relu': blocks.0.attn counts the patches of one grid"),
        (dict(mixer="hyena"), "pt2", "mixer='hyena': blocks.0.attn counts the patches of one grid"),
        (dict(mixer="scattering"), "onnx", "mixer='scattering': blocks.0.attn counts the patches of one grid"),
        (dict(mixer="mixer"), "pt2", "mixer='mixer': blocks.0.attn counts the patches of one grid"),
        (dict(mixer="softmax"), "openvino", "OpenVINO resamples learned positions otherwise than torch"),
        (
            dict(mixer="softmax", scale_logits=17),
            *("onnx", "scale_logits: the factor of the logits of blocks.0.attn is that of one number"),
        ),
    ],
)
def test_sizes_that_cannot_be_free_are_refused_before_an_export(keywords, to, words, tmp_path: Path) -> None:
    model = small(**keywords, depth=1, dynamic_img_size=True)
    with pytest.raises(InputError, match=words):
        export.export_model(model, CONFIG, to, "float32", tmp_path / f"m{export.SUFFIXES[to]}", dynamic_size=True)
    assert not list(tmp_path.iterdir())


def test_accuracy_counts_against_labels_and_against_the_first(photos: Path) -> None:
    model = nn.Identity()
    model.num_classes = 5
    items, _ = labelled_folder(photos, model)
    assert [label for _, label in items] == [label for label in range(5) for _ in range(4)]

    found = accuracy(dict(eager=always(1), file=always(2)), open_labelled(photos, model, 10, CONFIG), CONFIG)
    assert found == dict(images=10, top1=dict(eager=20.0, file=20.0), agreement=dict(eager=100.0, file=0.0))


def always(label: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A model of five classes that gives one answer to all images."""
    return lambda images: torch.eye(5)[[label] * len(images)]


@pytest.mark.parametrize("damaged", ["0.png", "3.png"])  # the first, which is decoded at once, or the last
def test_a_damaged_image_counts_in_no_accuracy(damaged: str, tmp_path: Path, photos: Path, capsys) -> None:
    shutil.copytree(photos / "class0", tmp_path / "images")
    (tmp_path / "labels.csv").write_text("0.png,4\n1.png,1\n2.png,2\n3.png,3\n")  # each the only one of its class
    model = nn.Identity()
    model.num_classes = 5
    os.truncate(tmp_path / "images" / damaged, 50)
    scores = accuracy(dict(one=always(1), four=always(4)), open_labelled(tmp_path, model, None, CONFIG), CONFIG)
    right = dict(one=100 / 3, four=0.0 if damaged == "0.png" else 100 / 3)
    assert scores == dict(images=3, top1=right, agreement=dict(one=100.0, four=0.0))
    name = tmp_path / "images" / damaged
    assert capsys.readouterr().out == f"skipped 1 of 4 images that cannot be read: {name}\n"
    for path in (tmp_path / "images").iterdir():
        os.truncate(path, 50)
    with pytest.raises(InputError, match="none of its 4 images can be read, such as .*0.png"):
        open_labelled(tmp_path, model, None, CONFIG)


def test_the_command_leaves_a_damaged_image_out(tmp_path: Path, photos: Path, monkeypatch, capsys) -> None:
    data, weights = tmp_path / "data", tmp_path / "weights.safetensors"
    shutil.copytree(photos / "class0", data)
    (data / "labels.csv").write_text("0.png,4\n1.png,1\n2.png,2\n")
    os.truncate(data / "2.png", 50)
    model = timm.create_model(SPEC.split()[0], **timm_arguments(SPEC.split()[1:]))
    nn.init.zeros_(model.head.weight)
    model.head.bias.data.copy_(torch.eye(5)[4])  # all images are of class 4
    save_file(model.state_dict(), weights)
    options = ["--to", "pt2", "--weights", weights, "--rounds", 1, "--threads", 1, "--out", tmp_path / "model.pt2"]
    export_command.main(command(SPEC, *options, "--data-dir", data))
    printed = capsys.readouterr().out
    assert "top-1 50.00 %, eager 50.00 %, the same answer on 100.00 % of 2 images" in printed
    assert f"skipped 1 of 3 images that cannot be read: {data / '2.png'}" in printed
    for name in ("0.png", "1.png"):
        os.truncate(data / name, 50)
    monkeypatch.setattr(export_command, "export_model", lambda *_: pytest.fail("exported before the images were seen"))
    with pytest.raises(InputError, match="none of its 3 images can be read, such as .*0.png"):
        export_command.main(command(SPEC, *options, "--data-dir", data))


def test_a_table_of_labels(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "images").symlink_to(photos / "class3")
    (tmp_path / "labels.csv").write_text("file,imagenet_class\n1.png,4\n0.png,2\n")
    model = nn.Identity()
    model.num_classes = 5
    items, _ = labelled_folder(tmp_path, model)
    assert items == [(tmp_path / "images" / "1.png", 4), (tmp_path / "images" / "0.png", 2)]
    (tmp_path / "labels.csv").write_text("1.png,4\n0.png,2\n")  # without a header
    assert labelled_folder(tmp_path, model)[0] == items
    (tmp_path / "labels.csv").write_text("file,imagenet_class\n1.png,5\n")
    with pytest.raises(InputError, match="line 2: expected FILE,CLASS with a class below 5"):
        labelled_folder(tmp_path, model)
    for content in ("file,class\nbär.png,4\n".encode("latin-1"), f'file,class\n"{"x" * 2**18}",4\n'.encode()):
        (tmp_path / "labels.csv").write_bytes(content)
        with pytest.raises(InputError, match=r"labels.csv cannot be read: .*; expected a CSV file in UTF-8"):
            labelled_folder(tmp_path, model)


def test_names_by_label_are_those_of_the_folders(photos: Path) -> None:
    """A saved configuration may have them as a mapping, whose labels are text."""
    model = nn.Identity()
    model.num_classes, names = 5, [f"class{label}" for label in (3, 0, 4, 1, 2)]
    model.pretrained_cfg = dict(label_names={str(label): names[label] for label in (4, 0, 3, 1, 2)})
    items, classes = labelled_folder(photos, model)
    assert classes == names and all(path.parent.name == names[label] for path, label in items)


def test_what_fails_leaves_what_was_there(tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "model.pt2"
    out.write_bytes(b"before")
    (tmp_path / "model.pt2.partial").mkdir()  # of a run that was killed

    def fail(program: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("no decomposition for aten::frexp")

    monkeypatch.setattr(export, "write_pt2", fail)
    with pytest.raises(InputError, match="to=pt2 with dtype=float32 cannot hold operator aten::frexp") as error:
        export.export_model(small("pool", depth=1), CONFIG, "pt2", "float32", out)
    assert "--to onnx or openvino or aoti" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"] and out.read_bytes() == b"before"


def test_weights_beside_the_file_that_are_of_no_such_model_stay(tmp_path: Path, monkeypatch) -> None:
    """OpenVINO's second file has a name that timm and the Hub give to weights of torch."""

    def write(*arguments: object) -> None:
        arguments[4].write_bytes(b"new model")
        arguments[4].with_suffix(".bin").write_bytes(b"new weights")

    def stop(*arguments: object) -> None:
        raise OSError("no space")

    model, out, weights = small("pool", depth=1), tmp_path / "m.xml", tmp_path / "m.bin"
    monkeypatch.setattr(export, "write", write)
    monkeypatch.setitem(export.OPEN, "openvino", lambda *_: model)
    weights.write_bytes(b"of torch")
    with pytest.raises(InputError, match=r"OpenVINO writes weights to .*m.bin, which is there without such a model"):
        export.export_model(model, CONFIG, "openvino", "float32", out, threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["m.bin"] and weights.read_bytes() == b"of torch"
    weights.unlink()
    weights.mkdir()
    out.write_bytes(b"a model")
    with pytest.raises(InputError, match="OpenVINO writes weights to"):
        export.export_model(model, CONFIG, "openvino", "float32", out, threads=1)
    assert out.read_bytes() == b"a model"
    weights.rmdir()
    weights.write_bytes(b"its weights")
    export.export_model(model, CONFIG, "openvino", "float32", out, threads=1)
    assert (out.read_bytes(), weights.read_bytes()) == (b"new model", b"new weights")
    assert {path.name for path in tmp_path.iterdir()} == {"m.xml", "m.bin"}
    # killed while the former files were aside and one of the new ones was in place; the next export fails
    former = tmp_path / "m.xml.partial" / "former"
    former.mkdir(parents=True)
    out.rename(former / out.name)
    weights.rename(former / weights.name)
    weights.write_bytes(b"newer weights")
    monkeypatch.setattr(export, "write", stop)
    with pytest.raises(OSError, match="no space"):
        export.export_model(model, CONFIG, "openvino", "float32", out, threads=1)
    assert (out.read_bytes(), weights.read_bytes()) == (b"new model", b"new weights")
    assert {path.name for path in tmp_path.iterdir()} == {"m.xml", "m.bin"}


@pytest.mark.parametrize("failing", ["m.bin", "m.xml"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("former", [True, False])
def test_a_model_is_never_left_with_the_weights_of_another(failing, error, former, tmp_path: Path, monkeypatch) -> None:
    out, partial, replace = tmp_path / "m.xml", tmp_path / "m.xml.partial", os.replace
    partial.mkdir()
    for folder, age in ((tmp_path, b"old"), (partial, b"new")):
        if age == b"new" or former:
            (folder / "m.xml").write_bytes(age + b" model")
            (folder / "m.bin").write_bytes(age + b" weights")

    def stop(source: Path, target: Path) -> None:
        if (source.parent, source.name) == (partial, failing):
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(error):
        export.replace_files([partial / "m.bin", partial / "m.xml"], out, partial / "former")
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert left == ({"m.xml": b"old model", "m.bin": b"old weights"} if former else {})


@pytest.mark.parametrize("entry", [dict(std=[0, 0, 0]), dict(mean="abc"), dict(interpolation="x")], ids=str)
def test_a_preparation_that_cannot_be_used_is_refused_before_an_export(entry: dict, tmp_path: Path) -> None:
    save_for_hf(small("pool", depth=1), tmp_path / "hub", safe_serialization=True)
    path, out = tmp_path / "hub" / "config.json", tmp_path / "model.pt2"
    config = json.loads(path.read_text())
    config["pretrained_cfg"].update(entry)
    path.write_text(json.dumps(config))
    out.write_bytes(b"before")
    with pytest.raises(InputError, match=r"model=local-dir:.*hub has a preparation of images that cannot be used: "):
        export_command.main(command(tmp_path / "hub", "--to", "pt2", "--out", out))
    assert out.read_bytes() == b"before" and {path.name for path in tmp_path.iterdir()} == {"hub", "model.pt2"}


def test_weights_and_sizes_are_given_once(tmp_path: Path) -> None:
    name, file = "vix_axial_cifar", str(tmp_path / "weights.safetensors")
    sizes = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=5)
    save_file(timm.create_model(name, img_size=32, **sizes).state_dict(), file)
    spec = " ".join([name, *(f"{key}={value}" for key, value in sizes.items())])
    with pytest.raises(InputError, match="weights and pretrained were both given"):
        export.build(spec, file, pretrained=True)
    with pytest.raises(InputError, match="img_size=64 and img_size=32 were both given"):
        export.build(f"{spec} img_size=32", file, img_size=64)
    for given, img_size in ((f"{spec} img_size=32", None), (f"{spec} img_size=32", 32), (spec, 32)):
        model, config = export.build(given, file, img_size=img_size)
        assert model.patch_embed.img_size == (32, 32) and config["input_size"] == (3, 32, 32)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["deit_tinny", "--to", "pt2", "--out", "a.pt2"], "model=deit_tinny is not there; allowed is hf-hub:"),
        (["vix_pool_cifar", "--to", "pt2", "--out", "a.pt2"], "random weights; give --weights FILE or --pretrained"),
        (["vix_pool_cifar", "--to", "pt2", "--out", "a.pt2", "--dtype", "int8"], "dtype=int8 needs --calibrate DIR"),
        (["vix_pool_cifar", "--to", "pt2", "--out", "a.pt2", "--calibrate", "x"], "--calibrate is for dtype=int8"),
        (["vix_pool_cifar", "--to", "pt2", "--out", "a.pt2", "--weights", "absent.pth"], "absent.pth"),
        (["local-dir:absent", "--to", "pt2", "--out", "a.pt2"], "model=local-dir:absent"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], words: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        export_command.main(command(*arguments))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_wrong_call_is_named(tmp_path: Path, photos: Path) -> None:
    model = small("pool", depth=1)
    with pytest.raises(InputError, match=r"expected a name that ends in \.onnx for to=onnx"):
        export.export_model(model, CONFIG, "onnx", "float32", tmp_path / "model.pt2")
    with pytest.raises(InputError, match="expected one of 'onnx', 'openvino', 'pt2', 'aoti'"):
        export.export_model(model, CONFIG, "tflite", "float32", tmp_path / "model.pt2")
    with pytest.raises(InputError, match="int8, which needs them"):
        export.export_model(model, CONFIG, "pt2", "int8", tmp_path / "model.pt2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        read_calibration(tmp_path / "empty", 8, CONFIG)
    model.num_classes = 7
    with pytest.raises(InputError, match="has 5 classes; the model has 7"):
        labelled_folder(photos, model)


def test_calibration_images_are_spread_and_prepared_as_timm_does(photos: Path) -> None:
    images = read_calibration(photos, 5, CONFIG)
    for image, label in zip(images, range(5)):
        pixels = np.asarray(Image.open(photos / f"class{label}" / "0.png"), dtype=np.float32)
        assert torch.allclose(image, torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_a_missing_library_is_named_with_its_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with (
        pytest.raises(InputError, match=r"openvino is not installed; pip install 'timm-vix\[openvino\]'"),
        needs("openvino"),
    ):
        import openvino  # noqa: F401


@pytest.mark.parametrize(
    "text, operator",
    [
        ("Could not find an implementation for Conv(11) node with name 'node_conv2d'", "Conv"),
        ("Type 'tensor(bfloat16)' of input parameter (_to_copy) of operator (Conv) in node (n)", "Conv"),
        ("Summary: -- No conversion rule found for operations: aten.exp2.default", "aten.exp2.default"),
        ("No ONNX function found for <OpOverload(op='aten.frexp', overload='Tensor')>", "aten.frexp"),
    ],
)
def test_the_operator_of_an_error_is_found_behind_others(text: str, operator: str) -> None:
    error = RuntimeError("conversion failed at a line of aten code")
    error.__cause__ = RuntimeError(text)
    assert operator_of(error) == f"operator {operator}"
    assert f"cannot hold operator {operator}: why" in str(cannot_hold("onnx", "int8", operator_of(error), "why"))


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(InputError) as caught:
        export.export_model(vit(depth=1), dict(CONFIG, input_size=(3, 32, 32)), "aoti", "float32", tmp_path / "m.pt2")
    assert "needs a C++ compiler" in str(caught.value) and "--dtype" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_is_no_operator_is_not_blamed_on_one(tmp_path: Path, monkeypatch) -> None:
    def fail(program, path, metadata):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(export, "write_pt2", fail)
    with pytest.raises(InputError, match="to=pt2 with dtype=float32 could not be written: .enforce fail"):
        export.export_model(small("pool", depth=1), CONFIG, "pt2", "float32", tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_model_too_large_for_one_onnx_file_is_refused(tmp_path: Path, monkeypatch) -> None:
    """torch puts more than 1.5 GB of weights beside the file, and the former file stays as it was."""
    pytest.importorskip("onnxruntime")
    written, out = torch.onnx.export, tmp_path / "model.onnx"
    out.write_bytes(b"before")
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **words: written(*args, **{**words, "external_data": True}))
    with pytest.raises(InputError, match="too large for one ONNX file; try --to openvino"):
        export.export_model(small("pool", depth=1), CONFIG, "onnx", "float32", out)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"] and out.read_bytes() == b"before"


def test_a_classifier_of_other_classes_than_the_weights_is_refused(tmp_path: Path) -> None:
    """timm leaves it out, and the exported model would have a random one."""
    model = small("pool", depth=1)
    timm.models.save_for_hf(model, tmp_path / "hub")
    loaded, _ = export.build(f"local-dir:{tmp_path / 'hub'}")
    x = calibration(model, 2)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(InputError, match="has 7 classes, but its weights are for 5 classes"):
        export.build(f"local-dir:{tmp_path / 'hub'} num_classes=7")


def test_a_folder_is_given_by_its_path_alone(tmp_path: Path) -> None:
    model = small("pool", depth=1)
    save_for_hf(model, tmp_path / "my run" / "hub", safe_serialization=True)
    x = calibration(model, 2)
    for spec in (tmp_path / "my run" / "hub", tmp_path / "my run", f"{tmp_path / 'my run'} drop_rate=0.1"):
        loaded, config = export.build(str(spec))
        assert torch.equal(loaded(x), model(x)) and tuple(config["input_size"]) == (3, 14, 10)
    with pytest.raises(InputError, match=r"other is not there; allowed is hf-hub:.*, a folder with config.json"):
        export.build(str(tmp_path / "other"))


def test_a_threshold_of_merging_is_refused_by_what_an_export_can_have(tmp_path: Path) -> None:
    model = small("softmax", depth=1, merge={"threshold": 0.9})
    with pytest.raises(InputError, match="a model for export takes a number or a share"):
        export.export_model(model, CONFIG, "pt2", "float32", tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_layout_that_a_kernel_chose_is_not_in_the_file(tmp_path: Path) -> None:
    """Performer's softmax over features has a bias, with which another kernel runs here than in an exported graph."""
    pytest.importorskip("onnxruntime")
    model = small("performer", depth=1)
    run, _ = export.export_model(model, CONFIG, "onnx", "float32", tmp_path / "model.onnx", None, threads=1)
    x = calibration(model, 5)
    with torch.inference_mode():
        assert distance(run(x), model(x)) < 1e-4


# what a format can't hold of a mixer
REFUSED = {("openvino", "fnet"): "operator DFT", ("openvino", "hyena"): "operator DFT"}


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino", "pt2", "aoti"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("mixer, rope, options", PLAIN)
def test_every_mixer(mixer, rope, options, dtype: str, to: str, tmp_path: Path) -> None:
    needed = dict(onnx=["onnxruntime"], openvino=["onnxruntime", "openvino"]).get(to, [])
    for library in needed + ([] if dtype != "int8" or to == "onnx" else ["nncf" if to == "openvino" else "torchao"]):
        pytest.importorskip(library)
    model = small(mixer, rope, **options, depth=1)
    out = tmp_path / f"model{export.SUFFIXES[to]}"
    images = calibration(model) if dtype == "int8" else None
    if words := "dtype=bfloat16" if (to, dtype) == ("onnx", "bfloat16") else REFUSED.get((to, mixer)):
        with pytest.raises(InputError, match=words) as error:
            export.export_model(model, CONFIG, to, dtype, out, images, threads=1)
        assert not list(tmp_path.iterdir())
        # another dtype is no remedy for what all of them lack
        assert ("--dtype" in str(error.value)) == ((to, mixer) not in REFUSED)
        return
    run, _ = export.export_model(model, CONFIG, to, dtype, out, images, threads=1)
    for batch in (1, 5):
        x = calibration(model, batch)
        with torch.inference_mode():
            assert distance(run(x), model(x)) < (1e-4 if dtype == "float32" else 0.15)


# a model of each family, of another mechanism than softmax where it has one
FAMILIES: dict[str, dict] = {
    "ccn_cifar": dict(img_size=(14, 10), patch_size=2, embed_dim=32, depth=1, num_heads=2, num_landmarks=12),
    "cvn_13": dict(
        img_size=(20, 12), embed_dims=(16, 16, 32), depths=(1, 1, 1), num_heads=(1, 2, 2), embed_strides=(4, 2, 2)
    ),
    "levin_128s": dict(img_size=(80, 48), embed_dim=(32, 64), key_dim=8, num_heads=(2, 4), depth=(1, 1)),
    "pin_tiny": dict(img_size=(20, 12), patch_size=4, stride=2, base_dims=(16, 16), depth=(1, 1), heads=(1, 2)),
    "t2t_vin_tiny": dict(img_size=(32, 48), patch_size=8, embed_dim=32, depth=1, num_heads=2, num_landmarks=6),
    "convix_gpsa_tiny": dict(img_size=(48, 48), depth=2, local_up_to_layer=1, embed_dim=8, num_heads=4),
    "fnet2d_cifar": dict(img_size=(14, 10), embed_dim=16, depth=1),
}


@torch.no_grad()
def check_export(model: nn.Module, config: dict, out: Path) -> None:
    """Export as torch's program, and compare with eager mode for a batch that the export didn't see."""
    run, _ = export.export_model(model, config, "pt2", "float32", out, threads=1)
    x = torch.randn(5, *config["input_size"])
    assert distance(run(x), model(x)) < rounding(torch.float32, condition(nn.Module.__call__, model, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, tmp_path: Path) -> None:
    model = lively(timm.create_model(name, num_classes=5, **FAMILIES[name]).eval())
    check_export(model, dict(CONFIG, input_size=(3, *FAMILIES[name]["img_size"])), tmp_path / "model.pt2")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_in_bfloat16(name: str, tmp_path: Path) -> None:
    """Stems with batch norm, too, which an exporter may fold into weights of another dtype."""
    pytest.importorskip("openvino")
    model = lively(timm.create_model(name, num_classes=5, **FAMILIES[name]).eval())
    config = dict(CONFIG, input_size=(3, *FAMILIES[name]["img_size"]))
    if name == "fnet2d_cifar":
        with pytest.raises(InputError, match="operator DFT"):
            export.export_model(model, config, "openvino", "bfloat16", tmp_path / "m.xml", threads=1)
        return
    run, _ = export.export_model(model, config, "openvino", "bfloat16", tmp_path / "m.xml", threads=1)
    x = torch.randn(3, *config["input_size"])
    with torch.no_grad():
        assert distance(run(x), model(x)) < 4 * distance(
            copy.deepcopy(model).bfloat16()(x.bfloat16()).float(), model(x)
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "keywords", [dict(mixer="nystrom", layers="last-1", num_landmarks=4), dict(merge=0.3)], ids=str
)
def test_a_conversion_that_was_saved(keywords: dict, tmp_path: Path) -> None:
    model = lively(vit(depth=2))
    timm_vix.convert(model, **keywords)
    save_for_hf(model, tmp_path / "hub", safe_serialization=True)
    check_export(*export.build(str(tmp_path / "hub")), tmp_path / "model.pt2")


@pytest.mark.slow
def test_one_image_to_calibrate_on_leaves_the_batch_free(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model = small("softmax", depth=1)
    run, _ = export.export_model(model, CONFIG, "pt2", "int8", tmp_path / "m.pt2", calibration(model)[:1], threads=1)
    for batch in (1, 3):
        x = calibration(model, batch)
        with torch.inference_mode():
            assert distance(run(x), model(x)) < 0.15


def check_sizes(model: nn.Module, to: str, folder: Path) -> None:
    """Export for images of any size, and compare with eager mode for some."""
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    out = folder / f"model{export.SUFFIXES[to]}"
    run, _ = export.export_model(model, CONFIG, to, "float32", out, dynamic_size=True, threads=1)
    for size in ((14, 10), (8, 18), (28, 20)):
        x = torch.randn(2, 3, *size)
        with torch.inference_mode():
            assert distance(run(x), model(x)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "pt2"])
@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_dynamic_size(stem: str, to: str, tmp_path: Path) -> None:
    check_sizes(small("softmax", depth=1, dynamic_img_size=True, stem=stem), to, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "pt2"])
@pytest.mark.parametrize("rope", ["axial", "1d"])
def test_dynamic_size_with_rotary_positions(rope: str, to: str, tmp_path: Path) -> None:
    """The program mustn't keep the table of the grid that it saw."""
    check_sizes(small("softmax", rope, depth=1, dynamic_img_size=True), to, tmp_path)


@pytest.mark.slow
def test_a_dtype_is_not_blamed_on_the_free_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = small("softmax", depth=1, dynamic_img_size=True)
    with pytest.raises(InputError, match="to=onnx with dtype=bfloat16 cannot hold operator"):
        export.export_model(model, CONFIG, "onnx", "bfloat16", tmp_path / "m.onnx", dynamic_size=True, threads=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_int8_keeps_the_accuracy_of_deit(to: str, deit: Path, tmp_path: Path, photographs: Path) -> None:
    import tarfile

    for library in dict(onnx=["onnxruntime"], openvino=["openvino", "nncf"])[to]:
        pytest.importorskip(library)
    with tarfile.open(photographs) as archive:
        archive.extractall(tmp_path / "photographs", filter="data")
    (table,) = (tmp_path / "photographs").rglob("labels.csv")
    model, config = export.build("deit_tiny_patch16_224", str(DEIT))
    images = read_calibration(table.parent, 50, config)
    out = tmp_path / f"deit{export.SUFFIXES[to]}"
    run, found = export.export_model(model, config, to, "int8", out, images)
    assert found["size_mb"] < 0.3 * 22.9
    scores = accuracy(dict(eager=model, file=run), open_labelled(table.parent, model, 250, config), config)
    assert scores["top1"]["file"] > scores["top1"]["eager"] - 2.5  # 250 images: one point is 2.5 of them
    assert scores["agreement"]["file"] > 93


@pytest.mark.slow
def test_the_example_measures_each_file_once(tmp_path: Path, photos: Path, monkeypatch) -> None:
    """What fails has a row, too, and is tried again when that is asked for."""
    for library in ("onnxruntime", "onnxscript"):
        pytest.importorskip(library)
    example = load_example("deploy")
    monkeypatch.setattr(example, "MODELS", {"tiny": SPEC})
    monkeypatch.setattr(example, "FORMATS", {"onnx": ("float32", "bfloat16")})
    name, *parts = SPEC.split()
    save_file(timm.create_model(name, **timm_arguments(parts)).state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "images").symlink_to(photos / "class3")
    (tmp_path / "labels.csv").write_text("file,imagenet_class\n0.png,3\n1.png,3\n2.png,3\n")

    def measured(*options: object) -> list[dict]:
        line = ["--images", tmp_path, "--weights", tmp_path / "weights.safetensors", "--calibrate", photos]
        line += ["--rounds", 1, "--threads", 1, "--out", tmp_path / "rows.csv", *options]
        monkeypatch.setattr(sys, "argv", ["deploy.py", *map(str, line)])
        assert exit_code(example.main) == 0
        rows, damaged = read_records(tmp_path / "rows.csv", example.COLUMNS, exact=True)
        assert damaged == 0
        return rows

    good, failed = measured()
    assert (good["dtype"], good["images"], good["agreement"], good["error"]) == ("float32", 3, 100.0, None)
    assert good["top1"] == good["eager_top1"] and good["ms_1"] > 0 and good["compiled_ms_8"] > 0
    assert good["runtime"].startswith("onnxruntime ")
    assert "dtype=bfloat16 cannot hold operator" in failed["error"] and failed["ms_1"] is failed["top1"] is None
    assert measured() == [good, failed]
    again = measured("--retry-failed")
    assert again[:2] == [good, failed] and [row["dtype"] for row in again] == ["float32", "bfloat16", "bfloat16"]
    given = dict(images=tmp_path, calibrate=photos, calibrate_images=400, models=["tiny"], formats=["onnx"], threads=1)
    for limit, known in ((3, True), (2, False)):
        jobs = list(example.jobs(argparse.Namespace(**given, limit=limit)))
        assert [key_of(job, example.KEY) in {key_of(row, example.KEY) for row in again} for job in jobs] == [known] * 2
