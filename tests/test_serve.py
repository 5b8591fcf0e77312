"""``timm-vix serve``: the page in a browser, and what it shows beside softmax."""

import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import DEIT, lively
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

import timm_vix
from timm_vix import cli
from timm_vix._checks import InputError
from timm_vix.data.images import Images, transforms
from timm_vix.deploy.baseline import softmax_baseline
from timm_vix.deploy.classifier import Classifier, address_of, class_names, load_trained, note_of_weights
from timm_vix.deploy.export import build, export_model
from timm_vix.deploy.serve import Answers, title_of

ROOT = Path(timm_vix.__file__).parents[1]
SHIPPED = ROOT / "examples" / "checkpoints" / "hybrid_pin_cifar"
SIZES = dict(img_size=32, patch_size=8, depth=2, num_classes=4)


def save(model, folder):
    save_for_hf(model, folder, safe_serialization=True)
    return str(folder)


def test_a_converted_model_stands_beside_what_it_was(tmp_path):
    source = lively(timm.create_model("vit_tiny_patch16_224", embed_dim=32, num_heads=2, **SIZES).eval())
    expected = source(x := torch.randn(2, 3, 32, 32))
    timm_vix.convert(source, "linformer", num_proj_tokens=4)
    model = load_trained(save(source, tmp_path))
    softmax, counts = softmax_baseline(model)
    assert counts and torch.allclose(softmax(x), expected, atol=1e-6)
    assert torch.equal(model(x), source(x)) and not torch.allclose(model(x), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["vix_nystrom_cifar", "vix_performer_cifar_rope"])
def test_our_models_stand_beside_softmax_with_their_weights(name, tmp_path):
    model = load_trained(save(lively(timm.create_model(name, **SIZES)), tmp_path))
    softmax, counts = softmax_baseline(model)
    other = timm.create_model(name.replace("nystrom", "softmax").replace("performer", "softmax"), **SIZES).eval()
    own = other.state_dict().keys()
    other.load_state_dict({key: value for key, value in model.state_dict().items() if key in own})
    assert counts and torch.equal(softmax(x := torch.randn(2, 3, 32, 32)), other(x))
    assert not torch.allclose(softmax(x), model(x), atol=1e-3)


def test_without_queries_and_keys_only_the_time_of_softmax_counts(tmp_path):
    model = load_trained(save(timm.create_model("vix_fnet_cifar", **SIZES), tmp_path))
    softmax, counts = softmax_baseline(model)
    assert not counts and type(softmax.blocks[0].attn).__name__ == "Attention" and softmax.num_classes == 4


def test_a_converted_model_without_queries_and_keys_stands_beside_its_source(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", embed_dim=32, num_heads=2, init_values=0.1, **SIZES)
    timm_vix.convert(source, "fnet", "last-1")
    softmax, counts = softmax_baseline(load_trained(save(source, tmp_path)))
    assert not counts and {type(block.attn).__name__ for block in softmax.blocks} == {"Attention"}
    assert softmax(torch.zeros(1, 3, 32, 32)).shape == (1, 4) and hasattr(softmax.blocks[0].ls1, "gamma")


@pytest.mark.parametrize("keywords", [dict(merge=4), dict(merge=0.5), dict(merge_keys=0.5)], ids=str)
def test_fewer_tokens_or_keys_stand_beside_all(keywords, tmp_path):
    source = lively(timm.create_model("vit_tiny_patch16_224", embed_dim=32, num_heads=2, **SIZES).eval())
    expected = source(x := torch.randn(2, 3, 32, 32))
    timm_vix.convert(source, "softmax", **keywords)
    softmax, counts = softmax_baseline(load_trained(save(source, tmp_path)))
    assert counts and torch.allclose(softmax(x), expected, atol=1e-6)
    assert not torch.allclose(source(x), expected, atol=1e-3)


def test_our_models_that_merge_stand_beside_softmax_that_does_not(tmp_path):
    model = load_trained(save(lively(timm.create_model("vix_performer_cifar", merge=3, **SIZES)), tmp_path))
    softmax, counts = softmax_baseline(model)
    assert counts and type(softmax.blocks) is torch.nn.Sequential


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_exported_file_answers_as_its_model(tmp_path):
    pytest.importorskip("onnxruntime")
    model, config = build(str(SHIPPED))
    export_model(model, config, "onnx", "float32", tmp_path / "file.onnx")
    answers = [Answers(Classifier(str(name)), softmax=False) for name in (SHIPPED, tmp_path / "file.onnx")]
    picture = Image.effect_noise((40, 40), 90).convert("RGB")
    (best, _), (expected, _) = (answer.of(picture) for answer in reversed(answers))
    assert best[0] == pytest.approx(expected[0], abs=1e-4)
    assert title_of(answers[1].classifier.net) == "hybrid_pin_cifar"
    with pytest.raises(InputError, match="file.onnx is an exported file; expected one with a mixer other than softmax"):
        Answers(Classifier(str(tmp_path / "file.onnx")), softmax=True)


def test_a_file_of_weights_replaces_those_of_a_converted_folder(tmp_path):
    def converted(number):
        model = timm.create_model("vit_tiny_patch16_224", embed_dim=32, num_heads=2, **SIZES).eval()
        timm_vix.convert(model, "linformer", num_proj_tokens=4)
        for _ in range(number):
            lively(model)
        return model

    first, second = converted(1), converted(2)
    folder, file = save(first, tmp_path / "hub"), str(tmp_path / "other.safetensors")
    save_file(second.state_dict(), file)
    x = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(first(x), second(x), atol=1e-3)
    assert torch.equal(load_trained(folder)(x), first(x))
    for net in (load_trained(folder, weights=file), build(folder, file)[0]):
        assert torch.equal(net(x), second(x))
    save_file(timm.create_model("vit_tiny_patch16_224", embed_dim=48, num_heads=2, **SIZES).state_dict(), file)
    with pytest.raises(InputError, match="cannot be loaded: the weights don't fit vit_tiny_patch16_224"):
        load_trained(folder, weights=file)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vix_nystrom_cifar", "vix_from_timm"])
def test_a_file_of_weights_has_its_own_number_of_classes(name, tmp_path):
    sizes = SIZES | dict(embed_dim=32, num_heads=2, num_classes=7)
    converts = name == "vix_from_timm"
    model = lively(timm.create_model("vit_tiny_patch16_224" if converts else name, **sizes).eval())
    file = str(tmp_path / "weights.safetensors")
    save_file(model.state_dict(), file)
    spec = " ".join([name, *(f"{key}={value}" for key, value in sizes.items())])
    if converts:  # the file is one of the source
        timm_vix.convert(model, "linformer", num_proj_tokens=4)
        spec += " source=vit_tiny_patch16_224 mixer=linformer num_proj_tokens=4"
    classifier, x = Classifier(spec, file), torch.randn(2, 3, 32, 32)
    assert classifier.names == [str(i) for i in range(7)]
    assert torch.equal(classifier.net(x), model(x))


def test_softmax_has_nothing_beside_it(tmp_path):
    for name in ("vix_softmax_cifar", "cvt_cifar"):
        assert softmax_baseline(timm.create_model(name, num_classes=4).eval()) == (None, False)


def test_a_photograph_of_an_upright_camera_is_seen_upright(tmp_path):
    classifier = Classifier(str(SHIPPED))
    upright = Image.effect_noise((40, 60), 90).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter to the right
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    seen = [classifier.prepare(tmp_path / f"{name}.png") for name in ("upright", "lying")]
    assert torch.equal(*seen) and seen[0].std() > 0.1


def test_a_models_folder_may_hold_something_else_called_hub(tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "model")
    (tmp_path / "model" / "hub").mkdir()
    assert address_of(str(tmp_path / "model")) == f"local-dir:{tmp_path / 'model'}"
    shutil.copytree(SHIPPED, tmp_path / "run" / "hub")
    assert address_of(str(tmp_path / "run")) == f"local-dir:{tmp_path / 'run' / 'hub'}"


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_grey_of_16_bits_is_that_of_8(suffix, tmp_path):
    """For the page as for training, calibration and accuracy; PIL would cut it off at white."""
    grey = np.asarray(Image.effect_noise((32, 32), 90))
    Image.fromarray(grey).save(tmp_path / f"8.{suffix}")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / f"16.{suffix}")
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "32.tiff")  # values up to 255 are what they are
    classifier = Classifier(str(SHIPPED))
    seen = [classifier.prepare(tmp_path / f"{name}.{suffix}") for name in (8, 16)]
    assert torch.equal(*seen) and seen[0].std() > 0.1
    assert torch.equal(classifier.prepare(tmp_path / "32.tiff"), seen[0])
    for name, values in (("unit", grey / 255), ("plain", grey)):
        Image.fromarray(values.astype(np.float32)).save(tmp_path / f"{name}.tiff")
        assert torch.equal(classifier.prepare(tmp_path / f"{name}.tiff"), seen[0])
    config = dict(input_size=(3, 32, 32), interpolation="bicubic", mean=(0.5,), crop_pct=1.0, crop_mode="center")
    resize, _, evaluate = transforms(config, "none", 0.0)
    data = Images([(tmp_path / f"{name}.{suffix}", 0) for name in (8, 16)], ["a"], 3, resize, evaluate, 0)
    assert torch.equal(data[None, 0][0], data[None, 1][0])


@pytest.mark.skipif(not DEIT.exists(), reason=f"{DEIT.name} is not beside the repository")
def test_a_shipped_delta_is_put_onto_weights_of_timm():
    delta = ROOT / "examples" / "deltas" / "axial" / "delta.safetensors"
    spec = "vix_from_timm source=deit_tiny_patch16_224 mixer=axial"
    overlay = dict(file=str(DEIT), source=None)
    expected = timm.create_model("deit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    timm_vix.convert(expected, "axial")
    timm_vix.load_delta(expected, delta)
    classifier, (exported, _) = Classifier(spec, str(DEIT), str(delta)), build(spec, str(DEIT), delta=str(delta))
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(classifier.net(x), expected(x)) and torch.equal(exported(x), expected(x))
    assert classifier.note == "" and "tench" in classifier.names
    with pytest.raises(InputError, match="none.safetensors is no file"):
        Classifier(spec, "none.safetensors")
    with pytest.raises(InputError, match="is no delta|does not fit|cannot be read"):
        Classifier(spec, str(DEIT), str(DEIT))


def test_weights_of_a_softmax_model_are_told(monkeypatch):
    """Our names begin with these; without queries and keys they mean nothing."""
    names = timm.list_models("vix_*_tiny", module=timm_vix.models.__all__)
    for name in names:
        model = timm.create_model(name, depth=1, img_size=32)
        if name.split("_")[1] in ("fnet", "mixer", "glu", "scattering"):
            with pytest.raises(InputError, match=f"{name} has the weights of a softmax model, which mean nothing"):
                note_of_weights(name, model)
        else:
            assert "not fine-tuned" in note_of_weights(name, model)
    assert note_of_weights("examples/checkpoints/hybrid_pin_cifar", load_trained(str(SHIPPED))) == ""


def test_weights_of_a_softmax_model_from_a_file_are_told(tmp_path):
    """A file of the model's own weights is taken without a note."""
    softmax = dict(depth=1, img_size=32, num_classes=10)
    save_file(timm.create_model("vit_tiny_patch16_224", **softmax).state_dict(), tmp_path / "softmax.safetensors")
    words = "depth=1 img_size=32 num_classes=10"
    for name in ("linformer", "performer"):
        own = timm.create_model(f"vix_{name}_tiny", **softmax, conv_residual=True).state_dict()
        save_file(own, tmp_path / "own.safetensors")
        spec = f"vix_{name}_tiny {words} conv_residual=True"
        assert Classifier(spec, str(tmp_path / "own.safetensors")).note == ""
        assert "not fine-tuned" in Classifier(spec, str(tmp_path / "softmax.safetensors")).note
    converted = f"vix_from_timm source=vit_tiny_patch16_224 {words} mixer="
    assert "not fine-tuned" in Classifier(f"{converted}nystrom", str(tmp_path / "softmax.safetensors")).note
    for spec in (f"{converted}fnet", f"vix_fnet_tiny {words}"):
        with pytest.raises(InputError, match="has the weights of a softmax model, which mean nothing to fnet"):
            Classifier(spec, str(tmp_path / "softmax.safetensors"))


def test_own_weights_of_a_mixer_without_parameters_are_no_softmax_model(tmp_path, caplog):
    save_file(timm.create_model("vix_fnet_cifar", depth=1).state_dict(), tmp_path / "own.safetensors")
    assert Classifier("vix_fnet_cifar depth=1", str(tmp_path / "own.safetensors")).note == ""
    assert not caplog.records
    save_file(timm.create_model("vix_axial_cifar", depth=1).state_dict(), tmp_path / "own.safetensors")
    assert Classifier("vix_axial_cifar depth=1", str(tmp_path / "own.safetensors")).note == ""
    assert "If they are of one, the model needs fine-tuning" in caplog.text


@pytest.mark.parametrize("load", [load_trained, build])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vix_nystrom_tiny", "hybrid_vit_tiny"])
def test_weights_for_other_classes_are_told(load, name, tmp_path):
    path = str(tmp_path / "softmax.safetensors")
    save_file(timm.create_model(name, depth=1, num_classes=7).state_dict(), path)
    with pytest.raises(InputError, match="has 1000 classes, and the weights are for 7; allowed here is num_classes=7"):
        load_trained(name, path, depth=1) if load is load_trained else build(f"{name} depth=1", path)
    with pytest.raises(InputError, match="has 10 classes, and the weights are for 7; allowed here is num_classes=7"):
        load_trained(name, path, depth=1, num_classes=10) if load is load_trained else build(
            f"{name} depth=1 num_classes=10", path
        )


def test_a_text_is_no_file_of_weights(tmp_path):
    (tmp_path / "notes.pth").write_text("hello")
    with pytest.raises(InputError, match="it is neither a .safetensors file nor one that torch.save wrote"):
        load_trained("vit_tiny_patch16_224", str(tmp_path / "notes.pth"))


def test_no_note_for_a_model_of_timm():
    assert note_of_weights("vit_tiny_patch16_224", timm.create_model("vit_tiny_patch16_224", depth=1)) == ""


def test_classes_have_names_where_they_are_known():
    assert class_names(load_trained(str(SHIPPED)))[0] == "airplane"
    names = class_names(timm.create_model("vit_tiny_patch16_224", depth=1))
    assert (len(set(names)), names[3], names[134], names[517]) == (1000, "tiger shark", "crane (134)", "crane (517)")
    assert class_names(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)) == ["0", "1", "2"]


def test_two_classes_of_one_name_are_told_apart(tmp_path):
    model = timm.create_model("vix_nystrom_cifar", **SIZES)
    names = ["n1", "n2", "n3", "n4"]
    model.pretrained_cfg.update(
        label_names=names, label_descriptions=dict(zip(names, ("crane", "crane", "egret", "owl")))
    )
    assert class_names(model) == ["crane (0)", "crane (1)", "egret", "owl"]


def test_names_by_label_come_in_the_order_of_labels(tmp_path):
    """timm also takes a mapping, whose labels are text once it was saved."""
    model = timm.create_model("vix_nystrom_cifar", **SIZES | dict(num_classes=12))
    names = {label: f"n{label}" for label in reversed(range(12))}
    save_for_hf(model, tmp_path, dict(label_names=names), safe_serialization=True)
    assert class_names(load_trained(str(tmp_path))) == [f"n{label}" for label in range(12)]


def test_a_folder_is_given_with_keywords(tmp_path):
    folder = save(timm.create_model("vix_nystrom_cifar", **SIZES), tmp_path / "my run")
    classifier = Classifier(f"{folder} img_size=48")
    assert classifier.size == [48, 48] and classifier.net.patch_embed.img_size == (48, 48)
    pixels = classifier.prepare(Image.effect_noise((40, 60), 90))
    assert pixels.shape == (1, 3, 48, 48) and len(classifier.best(pixels, 9)) == 4


CAT, DOG = {"cat": 0.7, "dog": 0.2}, {"dog": 0.5, "cat": 0.4}


@pytest.mark.parametrize(
    "softmax, counts, best, milliseconds, sentence",
    [
        (False, False, [CAT], [3.0], "**cat**"),
        (True, True, [CAT, CAT], [2.0, 5.0], "Both say **cat** · 2.50 times as fast as softmax attention"),
        (True, True, [CAT, DOG], [2.0, 5.0], "**cat** · 2.50 times as fast as softmax attention"),
        (True, True, [DOG, DOG], [4.0, 3.2], "Both say **dog** · 1.25 times the time of softmax attention"),
        (True, True, [DOG, CAT], [4.0, 3.2], "**dog** · 1.25 times the time of softmax attention"),
        (True, True, [CAT, CAT], [3.0, 3.0], "Both say **cat** · 1.00 times as fast as softmax attention"),
        # what untrained weights say is no answer, even if it is the same
        (True, False, [CAT, CAT], [2.0, 5.0], "**cat** · 2.50 times as fast as softmax attention"),
    ],
)
def test_the_verdict_tells_what_both_say_and_how_their_times_compare(
    softmax, counts, best, milliseconds, sentence, monkeypatch
):
    monkeypatch.setattr("timm_vix.deploy.serve.softmax_baseline", lambda net: (torch.nn.Identity(), counts))
    answers = Answers(SimpleNamespace(net=None, name="some"), softmax)
    assert answers.verdict(best, milliseconds) == sentence


@pytest.mark.skipif(find_spec("gradio") is None, reason="the page is Gradio's")
def test_what_cannot_be_served_is_one_line(tmp_path, monkeypatch, capsys):
    softmax = save(timm.create_model("vix_softmax_cifar", **SIZES), tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        for arguments, words in [
            (["vix_fnet_cifar"], ["model=vix_fnet_cifar has no trained weights", "hf-hub:USER/NAME"]),
            ([str(tmp_path / "none")], ["none is not there", "config.json"]),
            (["vix_nystrom_tine"], ["vix_nystrom_tine is not there", "near names: vix_nystrom_tiny"]),
            ([softmax, "--softmax"], ["is a model without efficient attention; expected one with a mixer other"]),
            ([softmax, "--port", taken], [f"port={taken} is not available", "--port"]),
            ([softmax, "--port", "70000"], ["port=70000: expected an integer from 1 to 65535"]),
        ]:
            monkeypatch.setattr(sys, "argv", ["timm-vix", "serve", *arguments])
            with pytest.raises(SystemExit) as stop:
                cli.main()
            errors = capsys.readouterr().err
            assert stop.value.code == 2 and errors.startswith("error: ") and errors.count("\n") == 1
            assert not [word for word in words if word not in errors], errors


@pytest.fixture(scope="module")
def address():
    """The page of the shipped model beside softmax, served by the command."""
    if find_spec("gradio") is None:
        pytest.skip("the page is Gradio's")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "timm_vix", "serve", str(SHIPPED), "--softmax", "--port", port]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        line = server.stdout.readline()
        assert line == f"http://127.0.0.1:{port}/ shows {SHIPPED}; Ctrl-C ends it\n"
        yield line.split()[0]
        server.send_signal(signal.SIGINT)
        server.communicate()
    assert server.returncode == 0


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is opened by playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser, address):
    """The open page, and the addresses from which it loaded something."""
    page = browser.new_page(viewport=dict(width=1200, height=760))
    loaded = []
    page.on("request", lambda request: loaded.append(request.url))
    page.goto(address)
    page.wait_for_selector("input[type=file]", state="attached")
    yield page, loaded
    page.close()


@pytest.mark.slow
def test_the_page_names_what_the_model_names(page, address, photographs, tmp_path):
    page, loaded = page
    with tarfile.open(photographs) as archive:
        member = next(member for member in archive if member.name.endswith((".png", ".jpg")))
        photo = tmp_path / Path(member.name).name
        photo.write_bytes(archive.extractfile(member).read())
    page.set_input_files("input[type=file]", photo)
    page.wait_for_selector("#best1 .confidence")
    model = timm.create_model(f"local-dir:{SHIPPED}", pretrained=True).eval()
    names = class_names(model)
    softmax = timm.create_model(
        "hybrid_pin_cifar", mixer="softmax", patch_size=2, stride=2, num_classes=10, img_size=32
    ).eval()
    softmax.load_state_dict({k: v for k, v in model.state_dict().items() if k in softmax.state_dict()})
    with torch.no_grad():
        pixels = create_transform(**resolve_model_data_config(model))(Image.open(photo).convert("RGB"))[None]
        firsts = []
        for i, net in enumerate((model, softmax)):
            shares = 100 * net(pixels).softmax(1)[0]
            shown = page.locator(f"#best{i} .text").all_inner_texts()
            assert shown == [names[j] for j in shares.topk(5).indices.tolist()]
            firsts.append(shown[0])
            percents = [int(text.rstrip("%")) for text in page.locator(f"#best{i} .confidence").all_inner_texts()]
            assert percents == pytest.approx(shares.topk(5).values.tolist(), abs=0.51)
            assert float(re.search(r"([\d.]+) ms", page.inner_text(f"#time{i}"))[1]) > 0
    verdict = page.inner_text("#verdict")
    assert verdict.startswith(f"Both say {firsts[0]} · " if firsts[0] == firsts[1] else f"{firsts[0]} · ")
    assert verdict.endswith(" softmax attention")
    assert {url.partition("/")[0] for url in loaded} <= {"http:", "blob:", "data:"}
    assert {url.split("/")[2] for url in loaded if url.startswith("http")} == {address.split("/")[2]}


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"no picture", None], ids=["text", "cut"])
def test_a_file_that_is_no_picture_is_told_and_the_page_goes_on(content, page, tmp_path):
    page, _ = page
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(content or (tmp_path / "good.png").read_bytes()[:2000])
    page.set_input_files("input[type=file]", tmp_path / "bad.png")
    page.wait_for_selector("#verdict :text('cannot be read as a picture')")
    assert page.locator("#best0 .confidence").count() == 0
    page.reload()
    page.wait_for_selector("input[type=file]", state="attached")
    page.set_input_files("input[type=file]", tmp_path / "good.png")
    page.wait_for_selector("#best0 .confidence")


@pytest.mark.parametrize(
    "name, value",
    [("label_names", 3), ("label_names", "x"), ("label_descriptions", "x"), ("label_descriptions", [1])],
)
def test_names_of_another_form_are_named(name, value, tmp_path):
    folder = save(timm.create_model("vix_softmax_cifar", **SIZES), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= dict(label_names=["a", "b", "c", "d"])
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(InputError, match=f"{name}={re.escape(repr(value))}; expected"):
        Classifier(folder)


def test_numbers_that_are_not_finite_are_no_answer(tmp_path):
    model = timm.create_model("vix_softmax_cifar", **SIZES)
    folder = save(model, tmp_path / "mean")
    config = json.loads((tmp_path / "mean" / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [math.nan] * 3
    (tmp_path / "mean" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"cannot be used: InputError mean=.*give no finite numbers"):
        Classifier(folder)
    model.head.bias.data[0] = math.nan
    classifier = Classifier(save(model, tmp_path / "weights"))
    with pytest.raises(InputError, match="gives logits that aren't finite for this picture"):
        classifier.best(torch.zeros(1, 3, 32, 32), 3)
