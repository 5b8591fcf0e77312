"""``timm-vix push``: what is checked before an upload, and what the Hub then gives back."""

import json
import os
import re
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from conftest import exit_code
from hub_server import Hub
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file, save_file
from timm.data import resolve_input_data_config

import timm_vix
from timm_vix import cli
from timm_vix._checks import InputError
from timm_vix.deploy.classifier import Classifier
from timm_vix.deploy.push import ABSOLUTE, FILES, LOADING, check_folder, push
from timm_vix.train.finetune import finetune
from timm_vix.train.hub import model_card, write_hub

DIGITS = dict(model_kwargs=dict(depth=1, patch_size=8, num_landmarks=4), epochs=1, device="cpu", threads=1, amp="off")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    """The folder of a fine-tuning of one epoch, of which the best was to be kept."""
    folder = tmp_path_factory.mktemp("run")
    settings = DIGITS | dict(model="vix_nystrom_cifar", data_dir=str(digits), batch_size=16, img_size=32)
    finetune(**settings, keep="best", license="apache-2.0", out=str(folder))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a run's folder."""
    return copied(trained, tmp_path / "run")


def copied(source, target):
    for path in source.rglob("*"):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return target


@pytest.fixture
def login(hub, tmp_path, monkeypatch):
    """The client talks to the Hub in this process, as the user who owns me/."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_token")


def outputs(address, tmp_path):
    model = timm.create_model(address, pretrained=True, cache_dir=tmp_path / address.replace("/", "-")).eval()
    x = torch.randn(3, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(x)


def changed(path, change):
    """Change a configuration in place by a function."""
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("keep", ["last", "best"])
def test_what_was_pushed_is_the_function_of_the_run(keep, run, login, tmp_path, monkeypatch, capsys):
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["settings"]["keep"] = keep
    other = dict.fromkeys(state["model"], torch.zeros(1))  # the epoch that was not kept
    torch.save(state | dict(model=other) if keep == "best" else state, run / "checkpoint.pt")
    if keep == "last":
        torch.save(other, run / "best.pt")
    monkeypatch.setattr(sys, "argv", ["timm-vix", "push", str(run), "me/flowers", "--private"])
    cli.main()
    assert capsys.readouterr().out.splitlines()[-1].startswith('timm.create_model("hf-hub:me/flowers"')
    assert {name.removeprefix("me/flowers/") for name in Hub.files} == FILES
    assert Hub.private == {"me/flowers": True}
    mine, theirs = outputs("hf-hub:me/flowers", tmp_path), outputs(f"local-dir:{run / 'hub'}", tmp_path)
    assert torch.equal(mine, theirs) and mine.std(0).min() > 0
    assert json.loads(Hub.files["me/flowers/config.json"]) == json.loads((run / "hub" / "config.json").read_text())
    card, local = ModelCard(Hub.files["me/flowers/README.md"].decode()), ModelCard.load(run / "hub" / "README.md")
    assert card.data.to_dict() == local.data.to_dict()
    (line,) = (line for line in card.text.splitlines() if "create_model" in line)
    assert line == 'model = timm.create_model("hf-hub:me/flowers", pretrained=True)'
    assert LOADING.sub("", card.text) == LOADING.sub("", local.text)


def test_a_folder_with_the_name_of_a_model_is_that_folder(run, login, tmp_path, monkeypatch):
    (run / "hub").rename(tmp_path / "hybrid_vin_cifar")
    monkeypatch.chdir(tmp_path)
    push(Path("hybrid_vin_cifar"), "me/flowers")
    mine = outputs("hf-hub:me/flowers", tmp_path)
    assert torch.equal(mine, outputs(f"local-dir:{tmp_path / 'hybrid_vin_cifar'}", tmp_path))


def test_a_file_of_two_dtypes_is_uploaded_as_it_is(run, login, tmp_path):
    path = run / "hub" / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"head.weight": weights["head.weight"].bfloat16()}, path)
    (run / "checkpoint.pt").unlink()  # its weights are others now
    push(run, "me/flowers")
    uploaded = load(Hub.files["me/flowers/model.safetensors"])
    assert all(torch.equal(uploaded[name], tensor) for name, tensor in weights.items() if name != "head.weight")
    assert torch.equal(uploaded["head.weight"], weights["head.weight"].bfloat16().float())


def test_a_branch_has_its_own_weights(run, login, tmp_path):
    first = outputs(f"local-dir:{run / 'hub'}", tmp_path)
    assert push(run / "hub", "me/flowers") == "me/flowers"
    path = run / "hub" / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"head.bias": weights["head.bias"] + 1}, path)
    (run / "checkpoint.pt").unlink()  # its weights are others now
    assert push(run, "me/flowers", revision="second") == "me/flowers@second"
    card = Hub.files["me/flowers@second/README.md"].decode()
    assert 'create_model("hf-hub:me/flowers@second", pretrained=True)' in card
    assert torch.equal(outputs("hf-hub:me/flowers", tmp_path), first)
    assert torch.allclose(outputs("hf-hub:me/flowers@second", tmp_path), first + 1)


def test_a_card_stays_with_its_weights_where_the_connection_drops(run, login, monkeypatch):
    def drop(*arguments, **keywords):
        raise OSError("connection reset by peer")

    def push_and_drop():
        before = dict(Hub.files)
        with monkeypatch.context() as patch:
            patch.setattr("timm_vix.deploy.push.push_to_hf_hub", drop)
            told = "the upload failed, and the same command tries again: connection reset"
            with pytest.raises(InputError, match=told):
                push(run, "me/flowers")
        assert Hub.files == before

    push_and_drop()  # a new repository has no card either
    push(run, "me/flowers")
    card = run / "hub" / "README.md"
    card.write_text(f"{card.read_text()}\nTrained again.\n")
    push_and_drop()
    push(run, "me/flowers")
    assert "Trained again." in Hub.files["me/flowers/README.md"].decode()


def test_a_model_that_takes_one_image_at_a_time_passes_the_checks(tmp_path):
    size = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    model = timm.create_model("vit_tiny_patch16_224", **size)
    timm_vix.convert(model, "softmax", merge={"threshold": 0.9})
    card = model_card("# A model\n\n| top-1 | 75.0 % |\n", "mit", True)
    write_hub(tmp_path / "hub", model, resolve_input_data_config(model), card)
    checked, _ = check_folder(tmp_path / "hub")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(checked(x), model.eval()(x))


def test_a_run_names_no_place_of_its_plan(digits, tmp_path):
    layers = {"1": {"mixer": "linformer", "num_proj_tokens": 4}}
    plan = dict(format="timm_vix plan 2", architecture="vit_tiny_patch16_224", depth=2, layers=layers)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    keywords = dict(source="vit_tiny_patch16_224", layers=str(tmp_path / "plan.json"))
    keywords |= dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    settings = DIGITS | dict(model="vix_from_timm", model_kwargs=keywords, data_dir=str(digits), batch_size=16)
    finetune(**settings, img_size=32, out=str(tmp_path / "run"))
    _, card = check_folder(tmp_path / "run" / "hub")
    assert "'layers': 'plan.json'" in card.text and str(tmp_path) not in card.text


def test_weights_in_bfloat16_stay_so(run, login, tmp_path):
    path = run / "hub" / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    (run / "checkpoint.pt").unlink()
    push(run, "me/small")
    assert torch.equal(outputs("hf-hub:me/small", tmp_path), outputs(f"local-dir:{run / 'hub'}", tmp_path))
    assert len(Hub.files["me/small/model.safetensors"]) == path.stat().st_size


DAMAGE = {
    "no card": (lambda hub: (hub / "README.md").unlink(), ["lacks README.md"]),
    "no weights": (lambda hub: (hub / "model.safetensors").unlink(), ["lacks model.safetensors"]),
    "pickle": (lambda hub: (hub / "pytorch_model.bin").touch(), ["pytorch_model.bin", "a pickle"]),
    "other file": (lambda hub: (hub / "notes.txt").touch(), ["notes.txt", "config.json, model.safetensors"]),
    "cut weights": (
        lambda hub: os.truncate(hub / "model.safetensors", 5000),
        ["cannot be loaded"],
    ),
    "other weights": (
        lambda hub: save_file(
            {name: tensor * 1.01 for name, tensor in load_file(hub / "model.safetensors").items()},
            hub / "model.safetensors",
        ),
        ["other outputs than the weights in", "best.pt"],
    ),
    "not finite": (
        lambda hub: save_file(
            load_file(hub / "model.safetensors") | {"head.bias": torch.full((3,), torch.nan)}, hub / "model.safetensors"
        ),
        ["outputs are not finite"],
    ),
    "damaged checkpoint": (lambda hub: os.truncate(hub.parent / "checkpoint.pt", 900), ["checkpoint.pt", "compared"]),
    "configuration names a file": (
        lambda hub: changed(hub / "config.json", lambda config: config["pretrained_cfg"].update(file="weights.pth")),
        ["config.json: file='weights.pth' is a place"],
    ),
    "absolute path in an argument": (
        lambda hub: changed(hub / "config.json", lambda config: config["model_args"].update(layers="/home/me/a.json")),
        ["config.json: layers='/home/me/a.json' is a place"],
    ),
    "absolute path of the start": (
        lambda hub: (hub / "README.md").write_text(
            (hub / "README.md").read_text() + "- model: local-dir:/home/me/runs/hub\n"
        ),
        ["README.md names '/home/me/runs/hub'"],
    ),
    "absolute path in the card": (
        lambda hub: (hub / "README.md").write_text((hub / "README.md").read_text() + "- data_dir: /home/me/photos\n"),
        ["README.md names '/home/me/photos'"],
    ),
    "absolute path in the front matter": (
        lambda hub: (hub / "README.md").write_text(
            (hub / "README.md").read_text().replace("---\n", "---\nbase_model: /home/me/runs/hub\n", 1)
        ),
        ["README.md names '/home/me/runs/hub'"],
    ),
    "absolute path as a key": (
        lambda hub: changed(hub / "config.json", lambda config: config.update({"/home/me/x": 1})),
        ["config.json: ", "'/home/me/x' is a place"],
    ),
    "no figures": (
        lambda hub: (hub / "README.md").write_text(
            (hub / "README.md").read_text().split("# vix")[0] + "# A model of flowers\n"
        ),
        ["README.md has no figures"],
    ),
    "no licence": (
        lambda hub: (hub / "README.md").write_text(
            (hub / "README.md").read_text().replace("license: apache-2.0\n", "")
        ),
        ["README.md lacks license in its front matter"],
    ),
    "no metadata": (
        lambda hub: (hub / "README.md").write_text("# flowers, 75 %\n"),
        ["README.md lacks library_name, license, pipeline_tag, tags"],
    ),
    "too few names of classes": (
        lambda hub: changed(hub / "config.json", lambda config: config.update(label_names=["rose", "tulip"])),
        ["config.json: 2 label_names for a model of 3 classes"],
    ),
    "a name of a class that is a list": (
        lambda hub: changed(hub / "config.json", lambda config: config.update(label_names=["rose", "tulip", ["lily"]])),
        ["['lily'] among its label_names; expected texts"],
    ),
    "a list of configurations": (
        lambda hub: (hub / "config.json").write_text("[]"),
        ["config.json holds a list; expected a mapping"],
    ),
    "no JSON": (lambda hub: (hub / "config.json").write_text("{"), ["cannot be read"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_nothing_is_uploaded_of_a_folder_that_fails_a_check(damage, run, login, monkeypatch, capsys):
    change, words = DAMAGE[damage]
    change(run / "hub")
    check_refused(["push", str(run), "me/flowers"], words, monkeypatch, capsys)


@pytest.mark.parametrize(
    "entry",
    [dict(interpolation="x"), dict(interpolation=5), dict(crop_pct="x"), dict(std=[None] * 3), dict(mean="x")],
    ids=str,
)
def test_a_preparation_that_cannot_be_used_is_named(entry, run):
    hub = run / "hub"
    changed(hub / "config.json", lambda config: config["pretrained_cfg"].update(entry))
    for read in (check_folder, lambda hub: Classifier(str(hub))):
        with pytest.raises(InputError, match="hub has a preparation of images that cannot be used: ") as error:
            read(hub)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, found",
    [
        *[(text, "/home/me/x") for text in ("|/home/me/x|", "[/home/me/x](a)", "**/home/me/x**", "<b>/home/me/x</b>")],
        *[(text, "/home/me/x") for text in ("{/home/me/x}", "(/home/me/x)", "'/home/me/x'", "at /home/me/x")],
        (r"\\server\share\x", r"\\server\share\x"),
        (r"C:\me\x y", r"C:\me\x"),
        ("[paper](/blob/main/README.md)", None),
        ("![figure](/home/me/x.png)", "/home/me/x.png"),
        ("[data](~/photos)", "~/photos"),
        (r"[data](C:\me\x)", r"C:\me\x"),
        ("https://arxiv.org/abs/2107.02239", None),
        ("90 km/h, 1/2, and/or, </b>, | / |", None),
    ],
)
def test_absolute_paths_are_found_wherever_a_text_has_one(text, found):
    match = ABSOLUTE.search(text)
    assert (match and match[1]) == found


def test_a_dry_run_checks_without_a_login_and_uploads_nothing(run, monkeypatch, capsys):
    monkeypatch.setattr("timm_vix.deploy.push.get_token", lambda: pytest.fail("a login was asked for"))
    monkeypatch.setattr(sys, "argv", ["timm-vix", "push", str(run), "me/flowers", "--dry-run"])
    assert exit_code(cli.main) == 0 and "nothing was" in capsys.readouterr().out
    (run / "hub" / "README.md").unlink()
    check_refused(["push", str(run), "me/flowers", "--dry-run"], ["lacks README.md"], monkeypatch, capsys)


@pytest.mark.parametrize("names", [["a"], "abc", 3])
def test_a_dry_run_approves_no_descriptions_that_classify_cannot_show(names, run, monkeypatch, capsys):
    changed(run / "hub" / "config.json", lambda config: config.update(label_descriptions=names))
    words = f"label_descriptions={names!r}; expected texts by name"
    check_refused(["push", str(run), "me/flowers", "--dry-run"], [words], monkeypatch, capsys)
    with pytest.raises(InputError, match=re.escape(words)):
        Classifier(str(run / "hub"))


def test_the_weights_of_the_run_are_found_from_inside_its_folder(run, login, monkeypatch, capsys):
    change, words = DAMAGE["other weights"]
    change(run / "hub")
    monkeypatch.chdir(run / "hub")
    check_refused(["push", ".", "me/flowers"], words, monkeypatch, capsys)


def check_refused(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["timm-vix", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    assert not [word for word in words if word not in errors], errors
    assert not Hub.files


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["me/flo wers"], ["repository='me/flo wers' is no USER/NAME"]),
        (["flowers"], ["repository='flowers' is no USER/NAME"]),
        (["me/a/b"], ["repository='me/a/b' is no USER/NAME"]),
        (["others/flowers"], ["repository=others/flowers", "no right to write", "write access"]),
    ],
    ids=str,
)
def test_a_name_that_cannot_be_or_without_rights(arguments, words, run, login, monkeypatch, capsys):
    check_refused(["push", str(run), *arguments], words, monkeypatch, capsys)


@pytest.mark.parametrize(
    "token, words", [("", ["no login", "hf auth login", "HF_TOKEN"]), ("hf_other", ["doesn't know this login"])]
)
def test_without_a_login(token, words, run, login, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", token)
    check_refused(["push", str(run), "me/flowers"], words, monkeypatch, capsys)


def test_without_a_connection(run, login, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    check_refused(["push", str(run), "me/flowers"], ["repository=me/flowers", "upload failed"], monkeypatch, capsys)


def test_in_offline_mode(run, login, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    check_refused(["push", str(run), "me/flowers"], ["offline mode", "unset", "HF_HUB_OFFLINE"], monkeypatch, capsys)


def test_a_folder_that_is_not_there(login, monkeypatch, capsys, tmp_path):
    check_refused(["push", str(tmp_path / "none"), "me/flowers"], ["none does not exist"], monkeypatch, capsys)


@pytest.mark.parametrize("name", ["file", "url", "hf_hub_id", "source"])
def test_a_configuration_sends_no_loader_elsewhere(name, run, tmp_path):
    """The weights are those of the folder, whatever its configuration says."""
    expected = outputs(f"local-dir:{run / 'hub'}", tmp_path)
    elsewhere = {"source": "file"}.get(name, str(tmp_path / "elsewhere"))
    changed(run / "hub" / "config.json", lambda config: config["pretrained_cfg"].update({name: elsewhere}))
    assert torch.equal(outputs(f"local-dir:{run / 'hub'}", tmp_path), expected)
