"""Example programs that have no file of tests of their own: what they compute, and what they refuse."""

import copy
import csv
import importlib
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import EXAMPLES, exit_code, lively, load_example, vit
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms.functional import to_tensor

import timm_vix
from timm_vix._records import earlier_records, read_records


def run(example, monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    """Exit code, output and errors of an example's command."""
    monkeypatch.setattr(sys, "argv", ["example", *map(str, words)])
    code = exit_code(example.main)
    return code, *capsys.readouterr()


def test_a_layer_is_measured_once_with_its_keywords(tmp_path, monkeypatch, capsys):
    example, out, threads = load_example("benchmark"), tmp_path / "mixers.csv", torch.get_num_threads()
    command = ["--mixers", "linformer", "--tokens", "197", "--mode", "infer", "--dtype", "float32", "--pairs", "1"]
    command += ["--batch-tokens", "197", "--threads", str(threads), "--out", str(out)]
    command += ["--options", "window_size=2", "sharing=none"]
    built = []
    layer = example.layer
    monkeypatch.setattr(example, "layer", lambda *arguments: built.append(layer(*arguments)) or built[-1])
    assert run(example, monkeypatch, capsys, *command)[0] == 0
    assert [(one.core.sharing, one.core.window_size) for one in built if hasattr(one, "core")] == [("none", 2)]
    (row,) = csv.DictReader(out.read_text().splitlines())
    assert float(row["ratio"]) == pytest.approx(float(row["softmax_ms"]) / float(row["ms"]), rel=0.01)
    before = out.read_text()
    assert run(example, monkeypatch, capsys, *command)[0] == 0
    assert out.read_text() == before and len(built) == 2


BRIEF = ["--mixers", "pool", "--tokens", "5", "--mode", "infer", "--dtype", "float32", "--pairs", "1"]


@pytest.mark.parametrize(
    "name, words, told",
    [
        ("benchmark", ["--tokens", "200"], "tokens=200: expected 1 more than a square"),
        ("benchmark", ["--mixers", "axial", "--options", "window_size=2"], "window_size=2: mixer='axial' takes"),
        ("benchmark", ["--options", "window_size"], "window_size"),
        ("public_packages", ["--tokens", "200"], "tokens=200: expected 1 more than a square"),
        ("benchmark", ["--threads", "0"], "error: threads=0: expected an integer of at least 1"),
        ("benchmark", ["--pairs", "0"], "error: pairs=0: expected an integer of at least 1"),
        ("benchmark", [*BRIEF, "--batch-tokens", "-1"], "error: batch_tokens=-1: expected an integer of at least 1"),
        ("benchmark", ["--device", "foo"], "error: device='foo' is not on this machine"),
        ("public_packages", ["--threads", "0"], "error: threads=0: expected an integer of at least 1"),
        ("public_packages", ["--pairs", "0"], "error: pairs=0: expected an integer of at least 1"),
        ("cost_over_resolution", ["--mixers", "nistrom"], "invalid choice: 'nistrom'"),
    ],
)
def test_wrong_words_are_named(name, words, told, tmp_path, monkeypatch, capsys):
    code, _, errors = run(load_example(name), monkeypatch, capsys, *words, "--out", tmp_path / "out.csv")
    assert code == 2 and told in errors.splitlines()[-1]
    assert not (tmp_path / "out.csv").exists()


PHOTOGRAPHS = ["--images", "images", "--weights", "weights.safetensors", "--out", "out.csv"]


@pytest.mark.parametrize(
    "name, step, words, told",
    [
        ("classify", "Classifier", ["absent.jpg"], "interrupted"),
        ("step_times", "read_rows", ["--out", "out.csv"], "interrupted"),
        ("convert_deit", "check_weights", [*PHOTOGRAPHS, "--again"], "interrupted"),
        ("convert_deit", "check_weights", PHOTOGRAPHS, "interrupted; the same command continues"),
        ("public_packages", "package_of", ["--out", "out.csv"], "interrupted; the same command continues"),
    ],
)
def test_only_an_example_that_goes_on_says_so(name, step, words, told, tmp_path, monkeypatch, capsys):
    def press(*arguments):
        raise KeyboardInterrupt

    example = load_example(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example, step, press)
    code, _, errors = run(example, monkeypatch, capsys, *words)
    assert (code, errors) == (130, f"{told}\n")


def test_a_table_of_other_columns_is_noticed_before_a_training(tmp_path, monkeypatch, capsys):
    example = load_example("compare_finetune")
    (tmp_path / "finetune_cifar10.csv").write_text("model,dataset,epoch,train_loss,top1,img_size\n")
    words = ["cifar10", "--data-dir", tmp_path / "none", "--results", tmp_path, "--runs", tmp_path / "runs"]
    code, _, errors = run(example, monkeypatch, capsys, *words)
    assert code == 2 and errors.count("\n") == 1 and "finetune_cifar10.csv was written by another version" in errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("table", ["cifar10", "parts_cifar10"])
def test_rows_of_a_training_are_all_there_in_the_end(table, digits, tmp_path, monkeypatch, capsys):
    example, results = load_example("compare_finetune"), tmp_path / f"finetune_{table}.csv"
    columns = example.COLUMNS if table == "cifar10" else {**example.COLUMNS, **example.PARTS_COLUMNS}
    monkeypatch.setattr(example, "measure_in_process", lambda job: dict(error="out of memory"))
    command = [table, "--data-dir", digits, "--results", tmp_path, "--runs", tmp_path / "runs", "--epochs", 2]
    command += ["--models", "vix_softmax_cifar depth=1 patch_size=8", "--img-size", 32, "--device", "cpu"]
    code, told, _ = run(example, monkeypatch, capsys, *command)
    assert code == 0 and told.count("could not be measured: out of memory") == (table != "cifar10")
    rows, damaged = read_records(results, columns, exact=True)
    assert [row["epoch"] for row in rows] == [1, 2] and not damaged
    if table != "cifar10":
        assert rows[1]["trained"] == rows[1]["parameters"] and rows[1]["step_ms"] is None
    # killed in the midst of the second row
    results.write_text("".join(results.read_text().splitlines(keepends=True)[:2]) + "vix_softmax_cifar depth=1 pat")
    assert run(example, monkeypatch, capsys, *command)[0] == 0
    again, damaged = read_records(results, columns, exact=True)
    assert again == [rows[0], *rows] and damaged == 1
    code, told, _ = run(example, monkeypatch, capsys, *command)
    assert code == 0 and "already in" in told
    # fewer epochs are another training, and so are more
    for epochs in (1, 3):
        code, _, errors = run(example, monkeypatch, capsys, *command, "--epochs", epochs)
        assert code == 2 and f"after 2 epochs; another --results keeps {epochs} apart" in errors


@pytest.mark.parametrize(
    "name, file",
    [
        *(("convert_deit", "convert_deit_tiny"), ("dense_features", "dense_features")),
        *(("compare_finetune", f"finetune_{table}") for table in load_example("compare_finetune").TABLES),
    ],
)
def test_rows_that_are_there_are_read(name, file):
    example = load_example(name)
    columns = {**example.COLUMNS, **(example.PARTS_COLUMNS if "_parts_" in file else {})}
    rows, damaged = earlier_records(EXAMPLES / "results" / f"{file}.csv", columns)
    assert rows and not damaged


@pytest.mark.parametrize("option, words", [("--epochs", "epochs=0: allowed"), ("--img-size", "img_size=0: allowed")])
def test_zero_is_not_the_number_of_the_table(option, words, digits, tmp_path, monkeypatch, capsys):
    example = load_example("compare_finetune")
    command = ["cifar10", "--data-dir", digits, "--results", tmp_path, "--runs", tmp_path / "runs", option, 0]
    command += ["--models", "vix_softmax_cifar depth=1"]
    code, _, errors = run(example, monkeypatch, capsys, *command)
    assert code == 2 and errors.count("\n") == 1 and words in errors
    assert not (tmp_path / "finetune_cifar10.csv").exists()


@pytest.mark.parametrize("name", ["convert_deit", "dense_features", "axial_variants"])
def test_weights_of_another_model_are_one_line(name, tmp_path, monkeypatch, capsys):
    weights = tmp_path / "weights.safetensors"
    save_file(vit().state_dict(), weights)
    for label in range(2):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / str(label) / "0.png")
    words = ["--images", tmp_path / "images", "--weights", weights, "--out", tmp_path / "out.csv"]
    code, _, errors = run(load_example(name), monkeypatch, capsys, *words)
    assert code == 2 and errors.count("\n") == 1
    assert f"with weights={weights} cannot be built: " in errors
    assert not (tmp_path / "out.csv").exists()


def test_an_interrupted_delta_leaves_the_former_one_with_its_card(tmp_path, monkeypatch):
    example = load_example("convert_deit")
    labels = torch.tensor([1, 2, 3, 4])
    content = b"former"

    def save(hub, path, weights):
        path.write_bytes(content)
        return None, dict(source="deit_tiny_patch16_224", mixer="axial")

    def state():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def write(predicted):
        monkeypatch.setattr(example, "predict", predicted)
        example.write_delta("hub", tmp_path, "weights", torch.zeros(4, 3, 8, 8), labels, labels)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "save_transferred", save)
    write(lambda *_: torch.tensor([1, 2, 3, 0]))
    former = state()
    assert former.keys() == {"README.md", "delta.safetensors"} and former["delta.safetensors"] == b"former"
    assert b"75.0 % of 4 photographs" in former["README.md"]
    content = b"new"
    with pytest.raises(KeyboardInterrupt):
        write(interrupted)
    assert state() == former
    write(lambda *_: torch.tensor([1, 2, 0, 0]))
    assert state()["delta.safetensors"] == b"new" and b"50.0 % of 4 photographs" in state()["README.md"]

    def full(path, data):
        if path.name == "README.md":
            raise OSError("no room")
        path.write_bytes(data)

    content = b"newest"
    monkeypatch.setattr(example, "write_whole", full)
    with pytest.raises(OSError, match="no room"):
        write(lambda *_: labels)
    assert state() == {"delta.safetensors": b"newest"}


@pytest.fixture
def photographs_of_two(tmp_path):
    """A folder of two photographs with labels, and a file of weights."""
    for i in range(2):
        Image.new("RGB", (32, 32), (100 * i,) * 3).save(tmp_path / f"{i}.png")
    (tmp_path / "labels.csv").write_text("0.png,3\n1.png,4\n")
    save_file(vit().state_dict(), tmp_path / "weights.safetensors")
    return ["--images", tmp_path, "--weights", tmp_path / "weights.safetensors", "--out", tmp_path / "rows.csv"]


def test_a_conversion_measured_again_is_appended(photographs_of_two, tmp_path, monkeypatch, capsys):
    example, conversion = load_example("convert_deit"), importlib.import_module("result_tables.conversion")
    command = [*photographs_of_two, "--img-size", 32, "--models", "linformer", "axial"]
    monkeypatch.setattr(example, "softmax", lambda weights, size: vit())
    monkeypatch.setattr(example, "predict", lambda model, images, title: torch.tensor([3, 0]))
    monkeypatch.setattr(example, "latency", lambda *_: (8.0, 0.5))
    assert run(example, monkeypatch, capsys, *command)[0] == 0
    with (tmp_path / "rows.csv").open("a") as file:
        file.write("axial,none,32")  # killed in the midst of a row
    before = (tmp_path / "rows.csv").read_text()
    code, told, _ = run(example, monkeypatch, capsys, *command)
    assert (code, told.count("already in")) == (0, 3) and (tmp_path / "rows.csv").read_text() == before
    monkeypatch.setattr(example, "latency", lambda *_: (2.0, 2.0))
    assert run(example, monkeypatch, capsys, *command, "--again")[0] == 0
    after = (tmp_path / "rows.csv").read_text()
    assert after.startswith(before + "\n") and after.count("\n") == 1 + 3 + 1 + 3
    # the table has each once, where it stood, and with what was measured last
    monkeypatch.setattr(conversion, "read", lambda name: read_records(tmp_path / "rows.csv", example.COLUMNS)[0])
    rows = conversion.read_conversions()
    assert [(row["model"], row["top1"], row["faster_than_softmax"]) for row in rows] == [
        (model, 50.0, 2.0) for model in ("softmax", "linformer", "axial")
    ]


def test_dense_features_are_measured_once(photographs_of_two, tmp_path, monkeypatch, capsys):
    example, teacher = load_example("dense_features"), lively(vit(num_classes=0))
    monkeypatch.setattr(example, "build_teacher", lambda *_: (copy.deepcopy(teacher), None))
    monkeypatch.setattr(example, "latency", lambda *_: (8.0, 0.5))
    monkeypatch.setattr(example, "CONVERSIONS", dict(axial=dict(mixer="axial")))
    for told in ("'model': 'axial'", f"32 px: already in {tmp_path / 'rows.csv'}"):
        code, out, _ = run(example, monkeypatch, capsys, *photographs_of_two, "--img-size", 32)
        assert code == 0 and told in out
        rows, damaged = read_records(tmp_path / "rows.csv", example.COLUMNS, exact=True)
        assert [(row["model"], row["tokens"]) for row in rows] == [("softmax", 17), ("axial", 17)] and not damaged
        assert rows[0]["cosine"] == 1.0 and rows[0]["relative_error"] == 0.0 < rows[1]["relative_error"]


def test_photographs_are_upright_and_16_bit_ones_are_not_clipped(tmp_path):
    example = load_example("convert_deit")
    turned = Image.Exif()
    turned[0x0112] = 6  # EXIF's orientation: the camera was turned by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(np.full((8, 4), 2**15, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "labels.csv").write_text("turned.png,3\ndeep.png,5\n")
    images, labels = example.read_images(tmp_path, 2, to_tensor)
    assert images.shape == (2, 3, 8, 4) and labels.tolist() == [3, 5]
    assert (255 * images[1] - 127).abs().max() <= 1


def test_kept_memory_is_counted_once_and_without_weights():
    """Of Linear, ReLU, Linear: the input of either linear layer, of which ReLU's output is one."""
    example = load_example("convert_deit")
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
    floats = 512 * 256 + 512 * 1024
    assert example.kept_mib(model, torch.randn(512, 256)) == floats * 4 / 2**20


def test_fidelity_of_multiples_and_of_orthogonal_tokens():
    example = load_example("dense_features")
    a, b = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 3.0]]])
    assert example.fidelity(2 * a, a) == pytest.approx((1.0, 1.0))
    assert example.fidelity(a, b) == pytest.approx((0.0, 2**0.5))


@pytest.mark.parametrize(
    "keywords, given",
    [
        (dict(strip_width=1), "strips of 1 (built in)"),
        (dict(strip_width=2), "one summary of each row, strips of 2 (built in)"),
        (dict(strip_width=4), "strips of 4 (built in)"),
        (dict(first="columns"), "columns first (built in)"),
    ],
)
def test_variants_of_axial_attention_begin_with_those_of_the_package(keywords, given):
    example = load_example("axial_variants")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(48, 80), patch_size=8, depth=1, embed_dim=32, num_heads=2
    )
    attn, x = lively(model).double().blocks[0].attn, torch.randn(2, 61, 32, dtype=torch.float64)
    variant = example.Variant(attn, 1, model.patch_embed.grid_size, example.VARIANTS[given])(x)
    timm_vix.convert(model, "axial", **keywords)
    assert (model.blocks[0].attn(x) - variant).abs().max() < 1e-10


@pytest.mark.parametrize(
    "given", [dict(pieces=3), dict(pieces=5, strip_width=1), dict(pieces=5), dict(curvature=True)], ids=str
)
def test_variants_of_axial_attention_are_exact_on_one_row(given):
    """Where each group is summarised at its own query, and several rows are not."""
    example = load_example("axial_variants")
    q, k, v = torch.randn(3, 2, 1, 10, 8, dtype=torch.float64)
    prefix = [torch.randn(2, 1, 8, dtype=torch.float64) for _ in range(2)]
    y = example.axial_rows(q, prefix, k, v, given)
    keys, values = (torch.cat([first, rest.flatten(1, 2)], 1) for first, rest in zip(prefix, (k, v)))
    expected = (q.flatten(1, 2) @ keys.transpose(1, 2)).softmax(2) @ values
    assert (y.flatten(1, 2) - expected).abs().max() < 1e-10


def test_structured_mlps_are_measured_once(photographs_of_two, tmp_path, monkeypatch, capsys):
    example, original = load_example("structured_mlp"), lively(vit(num_classes=1000))
    config = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic")
    config |= dict(crop_pct=1.0, crop_mode="center")
    monkeypatch.setattr(example, "build_teacher", lambda *_, **__: (copy.deepcopy(original).eval(), config))
    monkeypatch.setattr(example, "STRUCTURES", [("low_rank", 0.5), ("low_rank", 0.25)])
    command = [*photographs_of_two, "--data-dir", tmp_path, "--rounds", 1, "--threads", torch.get_num_threads()]
    for told in (2, 0):
        code, out, _ = run(example, monkeypatch, capsys, *command)
        assert code == 0 and out.count("'kind': 'low_rank'") == told
    rows, damaged = read_records(tmp_path / "rows.csv", example.COLUMNS, exact=True)
    assert not damaged and [(row["share"], row["fitted_to"]) for row in rows] == [(0.5, 2), (0.25, 2)]
    # a rank of layers of 128 x 32 is a whole number
    wanted = [round(int(share * 128 * 32 / 160) * 160 / (128 * 32), 3) for share in (0.5, 0.25)]
    assert [row["weights_left"] for row in rows] == wanted


def test_steps_of_trained_systems_are_timed_in_turn(tmp_path, monkeypatch, capsys):
    example, trained = load_example("step_times"), tmp_path / "trained.csv"
    text = (EXAMPLES / "results" / "reproduce_vix.csv").read_text().splitlines()
    systems = ("hybrid_pin_cifar", "levip_cifar")
    rows = [row for row in csv.DictReader(text) if example.is_long(row) and row["patch_size"] == "4"]
    rows = [row for row in rows if row["system"] in systems]
    for row in rows:
        row["batch_size"] = "2"
    with trained.open("w") as file:
        writer = csv.DictWriter(file, text[0].split(","))
        writer.writeheader()
        writer.writerows([*rows, dict(rows[0], seed="1")])  # another seed is the same system
    made = []
    make_call = example.make_call
    monkeypatch.setattr(example, "make_call", lambda *given: made.append(given) or make_call(*given))
    command = [
        "--results",
        trained,
        "--rounds",
        2,
        "--threads",
        torch.get_num_threads(),
        "--out",
        tmp_path / "times.csv",
    ]
    for _ in range(2):  # the rows are replaced
        assert run(example, monkeypatch, capsys, *command)[0] == 0
        found, damaged = read_records(tmp_path / "times.csv", example.COLUMNS, exact=True)
        assert not damaged and [(r["system"], r["dtype"], r["rounds"]) for r in found] == [
            (row["system"], row["dtype"], 2) for row in rows
        ]
        assert all(0 < row["ms_low"] <= row["ms"] <= row["ms_high"] for row in found)
    assert {type(model).__name__ for model, *_ in made} == {"PoolingXformer", "LevitXformer"}
    assert {job["dtype"] for *_, job in made} == {row["dtype"] for row in rows}
