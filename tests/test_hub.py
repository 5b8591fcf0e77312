"""Upload to a Hub and download from it, by the real client."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_server import Hub
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import timm_vix


def program(hub, text, folder):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment.update(
        HF_ENDPOINT=hub,
        HF_HOME=str(folder),
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        NO_PROXY="127.0.0.1",
        no_proxy="127.0.0.1",
        PYTHONPATH=str(Path(timm_vix.__file__).parents[1]),
    )
    head = "import timm, timm_vix, torch\nfrom timm.models import push_to_hf_hub\ntorch.manual_seed(0)\n"
    command = [sys.executable, "-c", head + text]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


MODELS = {
    "registered": """
model = timm.create_model("vix_performer_cifar", depth=1, num_classes=5, num_features=24, feature_seed=3).eval()
""",
    "converted": """
model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=32, num_heads=2, num_classes=5).eval()
timm_vix.convert(model, layers={0: "performer", 2: {"mixer": "linformer", "num_proj_tokens": 4}}, feature_seed=3)
""",
}


@pytest.mark.parametrize("kind", [pytest.param("registered", marks=pytest.mark.slow), "converted"])
def test_pushed_and_pulled_it_is_the_same_function(hub, kind, tmp_path):
    done = program(
        hub,
        MODELS[kind]
        + """
for tensor in model.state_dict().values():
    tensor.add_(0.1 * torch.randn_like(tensor))
push_to_hf_hub(model, "me/mine", token="hf_token", safe_serialization=True)
loaded = timm.create_model("hf-hub:me/mine", pretrained=True).eval()
assert type(loaded) is type(model)
assert loaded.patch_embed.img_size == model.patch_embed.img_size
assert tuple(loaded.pretrained_cfg["input_size"]) == (3, *model.patch_embed.img_size)
assert loaded.pretrained_cfg["num_classes"] == loaded.num_classes == 5
x = torch.randn(2, 3, *model.patch_embed.img_size)
assert torch.equal(loaded(x), model(x))
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {name.removeprefix("me/mine/") for name in Hub.files} >= {"config.json", "model.safetensors", "README.md"}


def test_a_strangers_pickle_is_not_run(hub, saved, tmp_path):
    import pickle

    class Hostile:
        def __reduce__(self):
            return (exec, ("raise SystemExit('code of a downloaded file ran')",))

    Hub.files = {f"me/mine/{file.name}": file.read_bytes() for file in saved.iterdir()}
    del Hub.files["me/mine/model.safetensors"]
    Hub.files["me/mine/pytorch_model.bin"] = pickle.dumps(Hostile())
    load = """
try:
    timm.create_model("hf-hub:me/mine", pretrained=True)
except ValueError as error:
    assert "readable weights" in str(error), error
else:
    raise AssertionError("accepted")
"""
    done = program(hub, load, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=32, num_heads=2, num_classes=5)
    timm_vix.convert(model, "nystrom", "last-2", num_landmarks=4)
    save_for_hf(model, folder, safe_serialization=True)
    return folder


def load_changed(saved, folder, **changes):
    """Load what is in ``saved`` with changes to entries of its configuration; None: without."""
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    config.pop("num_classes")  # at the top it would be taken instead
    for part, entries in changes.items():
        config[part].update(entries)
        config[part] = {name: value for name, value in config[part].items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(saved / "model.safetensors", folder)
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize(
    "arguments, words",
    [
        *(({name: 0}, [f"{name}=0", "at least 1"]) for name in ("num_heads", "patch_size", "in_chans", "depth")),
        *(({name: -2}, [f"{name}=-2", "at least 1"]) for name in ("num_heads", "in_chans", "depth", "embed_dim")),
        ({"img_size": [64, 0]}, ["img_size=[64, 0]", "at least 1"]),
        ({"num_heads": "two"}, ["'num_heads': 'two'", "don't build"]),
        ({"num_classes": -1}, ["num_classes=-1", "at least 0"]),
        ({"reg_tokens": -4}, ["reg_tokens", "don't build"]),
        ({"norm_layer": "evil"}, ["norm_layer", "don't build"]),
        ({"act_layer": "evil"}, ["act_layer", "don't build"]),
        *(({name: None}, [repr(name), "lacks"]) for name in ("source", "mixer", "layers")),
    ],
    ids=str,
)
def test_broken_saved_arguments_are_named(saved, arguments, words, tmp_path):
    with pytest.raises(ValueError) as error:
        load_changed(saved, tmp_path, model_args=arguments)
    assert not [word for word in words if word not in str(error.value)], error.value


@pytest.mark.parametrize("conversion", [0, "", []], ids=repr)
def test_a_conversion_that_is_no_mapping_is_named(saved, conversion, tmp_path):
    with pytest.raises(ValueError, match="conversion=.*expected the mapping with .given. and .found."):
        load_changed(saved, tmp_path, model_args=dict(conversion=conversion))


@pytest.mark.parametrize(
    "cfg",
    [
        *({"num_classes": value} for value in (-1, "evil", 1.5)),
        *({"input_size": value} for value in ("evil", 64, [3, 64], [3, 0, 64])),
        *({"first_conv": value} for value in (3, ["patch_embed.proj", 3])),
        {"classifier": 3},
    ],
    ids=str,
)
def test_a_broken_saved_configuration_is_named(saved, cfg, tmp_path):
    (name,) = cfg
    with pytest.raises(ValueError, match=f"{name}="):
        # timm reads the input size from the arguments if they have one
        load_changed(
            saved, tmp_path, pretrained_cfg=cfg, model_args=dict.fromkeys(["img_size", "in_chans", "num_classes"])
        )


@pytest.mark.parametrize(
    "content", [b"hello world", [torch.zeros(2)], torch.zeros(2), {1: torch.zeros(2)}, {"head.bias": "evil"}], ids=str
)
def test_weights_of_something_else_are_refused(saved, content, tmp_path):
    shutil.copy(saved / "config.json", tmp_path)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match="no readable weights"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_repository_that_is_not_there(hub, tmp_path):
    done = program(hub, 'timm.create_model("hf-hub:me/nothing", pretrained=True)', tmp_path)
    assert done.returncode != 0 and "nothing" in done.stderr


@pytest.mark.parametrize(
    "value", [{"checkpoint_path": "/etc/hostname"}, {"pretrained_cfg": {"url": "https://x"}}], ids=str
)
def test_a_saved_configuration_names_no_other_weights(value, tmp_path):
    """Neither among its arguments nor among those of the source."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=2, depth=2)
    timm_vix.convert(model, "linformer")
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    for place in ({"source_kwargs": value}, value):
        changed = {**config, "model_args": {**config["model_args"], **place}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises((ValueError, TypeError), match="may not say how to load|multiple values"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_projection_without_axes_is_refused(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=2, depth=2)
    timm_vix.convert(model, "linformer")
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["blocks.0.attn.core.token_proj"] = torch.zeros(())
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"weights don't fit .*blocks\.0\.attn\.core\.token_proj"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
