"""Block presets, weights for single blocks and weights over time, as an artist types them."""

import pytest

from prefgen.apply_options import (
    PRESETS,
    interpolated,
    parse_block_weights,
    parse_item_weights,
    parse_weight_schedule,
    preset_blocks,
)


def unet(depths, kind):
    """(blocks, widths) from {stage: (transformers, width)}."""
    pairs = [((kind, stage, i), width) for stage, (depth, width) in depths.items() for i in range(depth)]
    return [block for block, _ in pairs], [width for _, width in pairs]


def joined(*parts):
    return tuple(sum((part[i] for part in parts), []) for i in range(2))


SD15 = joined(
    unet({1: (1, 320), 2: (1, 320), 4: (1, 640), 5: (1, 640), 7: (1, 1280), 8: (1, 1280)}, "input"),
    unet({n: (1, w) for n, w in enumerate([1280] * 3 + [640] * 3 + [320] * 3, 3)}, "output"),
    unet({0: (1, 1280)}, "middle"),
)
SDXL = joined(
    unet({4: (2, 640), 5: (2, 640), 7: (10, 1280), 8: (10, 1280)}, "input"),
    unet({0: (10, 1280), 1: (10, 1280), 2: (10, 1280), 3: (2, 640), 4: (2, 640), 5: (2, 640)}, "output"),
    unet({0: (10, 1280)}, "middle"),
)


def chosen(model, preset="all", text=""):
    """{stage: weight} where a stage has one weight."""
    weights = {}
    for (kind, stage, _), weight in zip(model[0], parse_block_weights(*model, preset, text), strict=True):
        assert weights.setdefault((kind, stage), weight) == weight
    return weights


def test_all_is_every_block_with_weight_1():
    assert set(parse_block_weights(*SDXL)) == {1.0} and len(parse_block_weights(*SDXL)) == 70


@pytest.mark.parametrize(
    ("model", "preset", "stages"),
    [
        (SDXL, "style", {("output", 1)}),
        (SDXL, "composition", {("input", 8)}),
        (SD15, "style", {("output", 3), ("output", 4), ("output", 5)}),
        (SD15, "composition", {("input", 7), ("input", 8), ("middle", 0)}),
    ],
)
def test_the_presets_are_the_blocks_that_instantstyle_found(model, preset, stages):
    assert {block[:2] for block in preset_blocks(*model, preset)} == stages
    assert {stage for stage, weight in chosen(model, preset).items() if weight} == stages


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["input", "output", "middle"])
def test_a_preset_of_a_unet_with_attention_on_one_side_only_never_fails(preset, kind):
    assert set(parse_block_weights(*unet({0: (1, 64)}, kind), preset)) <= {0.0, 1.0}


def test_single_blocks_take_the_place_of_the_presets_weight_and_later_entries_win():
    weights = chosen(SD15, "style", "in8=0.5, OUT4 = 0\nmid: -1; out11=2,")
    assert weights["input", 8] == 0.5 and weights["output", 4] == 0 and weights["middle", 0] == -1
    assert weights["output", 3] == 1 and weights["output", 11] == 2 and weights["input", 1] == 0
    assert chosen(SD15, "all", "all=0, out=0.5, out3=1")["output", 3] == 1
    assert chosen(SD15, "all", "out3=1, all=0")["output", 3] == 0


def test_one_transformer_of_a_stage():
    weights = dict(zip(SDXL[0], parse_block_weights(*SDXL, "all", "in8.3=0, mid.9=0.5"), strict=True))
    assert weights["input", 8, 3] == 0 and weights["middle", 0, 9] == 0.5
    assert weights["input", 8, 4] == weights["middle", 0, 8] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("in3=1", "has no block 'in3'; it has in1, in2, in4, in5, in7, in8, mid, out3 to out11"),
        ("in8=1, uot1=0.5", "'uot1'"),
        ("in8.1=1", "'in8.1'"),
        ("mid0=1", "'mid0'"),
        ("in8", "'in8' is not a name and a number"),
        ("in8=", "'in8='"),
        ("in8=much", "'in8=much'"),
        ("in8=nan", "'in8=nan'"),
        ("=1", "'=1'"),
        ("in8 0.5", "'in8 0.5'"),
    ],
)
def test_a_typing_error_in_the_blocks_is_one_sentence(text, words, one_sentence):
    with pytest.raises(ValueError) as raised:
        parse_block_weights(*SD15, "all", text)
    assert words in one_sentence(raised) and "block_weights" in str(raised.value)


def test_an_unknown_preset_is_named(one_sentence):
    with pytest.raises(ValueError) as raised:
        parse_block_weights(*SD15, "stile")
    assert "all, style, composition" in one_sentence(raised)


def test_a_schedule_runs_in_straight_lines_and_is_level_outside_its_points():
    points = parse_weight_schedule("0.5=0.2, 0.25 = 1\n1:0")
    assert points == ((0.25, 1.0), (0.5, 0.2), (1.0, 0.0))
    shares = {0.0: 1.0, 0.25: 1.0, 0.375: 0.6, 0.5: 0.2, 0.75: 0.1, 1.0: 0.0}
    assert all(interpolated(points, share) == pytest.approx(weight) for share, weight in shares.items())
    assert interpolated(parse_weight_schedule("0.5=2"), 0.1) == interpolated(parse_weight_schedule("0.5=2"), 0.9) == 2
    assert parse_weight_schedule("") == parse_weight_schedule(" \n, ") == ()


@pytest.mark.parametrize("text", ["1.5=1", "-0.1=1", "start=1", "0.5", "0=one", "0=inf"])
def test_a_typing_error_in_the_schedule_is_one_sentence(text, one_sentence):
    with pytest.raises(ValueError) as raised:
        parse_weight_schedule(text)
    assert text.removesuffix("=1") in one_sentence(raised) and "weight_schedule" in str(raised.value)


def test_item_weights_are_points_over_the_batch():
    points = parse_item_weights("15=0, 0=1")
    assert points == ((0.0, 1.0), (15.0, 0.0)) and parse_item_weights("") == ()
    assert interpolated(points, 3) == pytest.approx(0.8) and interpolated(points, 40) == 0
    step = parse_item_weights("1=1; 2=0")
    assert [interpolated(step, i) for i in range(4)] == [1, 1, 0, 0]


@pytest.mark.parametrize("text", ["a=1", "-1=1", "0.5=1", "1"])
def test_item_weights_that_name_no_item_are_one_sentence(text):
    with pytest.raises(ValueError, match="item_weights: .*") as raised:
        parse_item_weights(text)
    assert "\n" not in str(raised.value)
