"""pytest plugin for timm's own ``tests/test_models.py``: other models take the place of one of timm's, a host.

``test_models.py`` fills its parameter lists with ``timm.list_models(...)`` while it is imported. This plugin answers
those calls: where timm's own answer holds the host it is the names of ``--models``, elsewhere nothing. So a model runs
what its host runs, a plain ViT or the model that it is built on, with timm's exclusions for the host and no others.

    PYTHONPATH=tests python -m pytest -p timm_suite_plugin --models vix_fnet_tiny,vix_fnet_cifar .../test_models.py

Left out are only the tests that download weights from the Hub: most of our names have no weights of their own, and a
test run shall not depend on somebody's server. Tests of one named model of timm are none of ours.
"""

import pytest
import timm

import timm_vix  # noqa: F401  registers the names

HOST = "vit_tiny_patch16_224"

NEED_THE_HUB = {"test_model_inference", "test_model_load_pretrained", "test_model_features_pretrained"}


def listed_by_hand(name: str) -> dict[str, list]:
    """Tests of behaviours that timm asks of a list of models, with values for the parameters after ``model_name``.

    The plain ViT isn't on these lists but passes with these values. Two of the tests take 64 px images: patches of 8 px
    are the largest that leave the ``cifar`` names their 64 landmarks. Two take 224 x 288 px: too many for patches of 1.
    """
    size = timm.get_pretrained_cfg_value(name, "input_size")[-1]
    return {
        "test_prune_intermediate_layers_params_used": [],
        "test_features_only_feature_cls_class": [],
        "test_catavgmax_unsupported": [],
        "test_head_hidden_size": [{"img_size": 64, "patch_size": 8}],
        "test_model_init_weights_after_to_empty": [{"img_size": 64, "patch_size": 8}],
        "test_headless_checkpoint_reload": [{}],
        "test_relpos_family_set_input_size": [{}, size, size * 8 // 7],
        "test_relpos_non_square_set_input_size": [{"img_size": 224, "patch_size": 16}],
        "test_relpos_non_square_checkpoint_reload": [{"img_size": 224, "patch_size": 16}],
    }


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--host", default=HOST, help="model of timm whose place is taken")
    parser.addoption("--models", default=HOST, help="comma-separated model names")


def chosen(config: pytest.Config) -> list[str]:
    return config.getoption("--models").split(",")


def pytest_configure(config: pytest.Config) -> None:
    listed_by_timm, host = timm.list_models, config.getoption("--host")

    def list_models(*args, **kwargs) -> list[str]:
        of_host = [name for name in listed_by_timm(*args, **kwargs) if name.split(".")[0] == host]
        return listed_by_timm(chosen(config), include_tags=of_host != [host]) if of_host else []

    timm.list_models = list_models


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put the models in the place of those that timm listed by hand."""
    test = metafunc.function.__name__
    if test not in listed_by_hand(HOST) or metafunc.config.getoption("--host") != HOST:
        return
    marks = metafunc.definition.own_markers
    place = next(i for i, mark in enumerate(marks) if mark.name == "parametrize" and "model_name" in mark.args[0])
    rests = {name: listed_by_hand(name)[test] for name in chosen(metafunc.config)}
    values = [(name, *rest) if rest else name for name, rest in rests.items()]
    marks[place] = pytest.mark.parametrize(marks[place].args[0], values).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names = chosen(config)

    def wanted(item: pytest.Item) -> bool:
        # an empty list of models shows as a parameter that is no string
        name = item.callspec.params.get("model_name") if hasattr(item, "callspec") else None
        return isinstance(name, str) and name.split(".")[0] in names and item.originalname not in NEED_THE_HUB

    kept = [item for item in items if wanted(item)]
    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = kept
