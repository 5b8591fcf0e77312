"""The figure of a plan: what its candidates keep, over how fast they are."""

from typing import Any

from .._figures import BLACK, BLUE, ORANGE, VERMILION, canvas

KEPT = {
    "predictions": "predictions that stay the same (%)",
    "top-1": "of softmax's top-1 (%)",
    "cosine": "mean cosine of the output tokens, times 100",
}


def agreement_over_time(plan: dict[str, Any]) -> Any:
    """What is kept over the speed, of all models that a plan (``timm-vix plan``) measured whole."""
    figure, axes = canvas()
    for marker, colour, size, label, chosen in (
        ("o", BLUE, 6, "measured", False),
        ("*", VERMILION, 16, "chosen", True),
    ):
        rows = [row for row in plan["curve"] if row["chosen"] == chosen]
        speeds, kept = [row["speedup"] for row in rows], [100 * row["kept"] for row in rows]
        axes.plot(speeds, kept, marker, color=colour, markersize=size, label=label)
    if plan["keep_of"] != "cosine":  # which is no count, so that nothing else is expected
        speeds, kept = ([row[name] for row in plan["curve"]] for name in ("speedup", "expected_kept"))
        label = "expected on other images, by distance"
        axes.plot(speeds, [100 * share for share in kept], "_", color=BLACK, markersize=10, label=label)
    held_out = 100 * plan["held_out_kept"]
    axes.plot(plan["speedup"], held_out, "D", color=ORANGE, markersize=8, label="chosen, on other images")
    if plan["keep"]:
        axes.axhline(100 * plan["keep"], color=BLACK, linestyle="--", linewidth=1, label="wanted")
    if plan["speedup_wanted"]:
        axes.axvline(plan["speedup_wanted"], color=BLACK, linestyle="--", linewidth=1, label="wanted")
    axes.set(xlabel="times as fast as softmax", ylabel=KEPT[plan["keep_of"]])
    axes.set_title(f"{plan['source']}, {plan['img_size']} px, batch {plan['latency_batch']}, {plan['dtype']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return figure
