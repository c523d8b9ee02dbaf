"""Whatever a model call holds, every row gets the user that belongs to it: tiles, regions, areas, windows, halves."""

import threading

import comfy.context_windows
import comfy.samplers
import pytest
import torch

from tests.closeness import SAMPLED, difference
from tests.prefgen.comfy import studio

SIZE = (16, 32)  # two tiles of 16 x 16 side by side
SIDES = ("positive", "both")
LEFT, RIGHT = (..., slice(0, 16)), (..., slice(16, 32))


@pytest.fixture(scope="module")
def model():
    return studio.build()


@pytest.fixture(scope="module")
def users(pack, model):
    return studio.users(pack, model)


@pytest.fixture
def apply_user(pack):
    return pack("prefgen.comfy.patcher").apply_user


@pytest.fixture
def layout_error(pack):
    return pack("prefgen.comfy.layout").LayoutError


def close(one, other):
    """Whether two latents agree within what another order of sums makes of them."""
    return difference(one, other).item() <= SAMPLED * torch.finfo(torch.float32).eps


def half_mask(side):
    mask = torch.zeros(1, 64, 128)
    mask[..., slice(0, 64) if side == "left" else slice(64, 128)] = 1
    return mask


def stacked(rows, order):
    """Tiles [rows, ...] of a batch in one batch: tile after tile, or all tiles of a row before the next row."""
    if order == "tile-major":
        return torch.cat(rows)
    return torch.stack(rows, 1).flatten(0, 1)


def unstacked(batch, count, order):
    return batch.chunk(count) if order == "tile-major" else batch.unflatten(0, (-1, count)).unbind(1)


def tiled(model, at_once, order="tile-major", carry=None, roll=0, height=16, change=lambda tile: tile):
    """A sampler wrapper that cuts the latent into tiles of height x 16 and paints `at_once` of them in one model call.

    carry: the names of the tensors that it hands on, all if None. roll: pixels by which it turns the latent first, as
    SpotDiffusion does. change: what it makes of a tile before it is painted.
    """

    def tiles_of(x):
        return [tile for band in x.split(height, 2) for tile in band.split(16, 3)]

    def wrapper(apply_model, args):
        x, t = args["input"], args["timestep"]
        c = {k: v for k, v in args["c"].items() if carry is None or k in carry or not isinstance(v, torch.Tensor)}
        tiles = [change(tile) for tile in tiles_of(x.roll(roll, 3))]
        painted = []
        for start in range(0, len(tiles), at_once):
            some = tiles[start : start + at_once]
            count = len(some)
            arguments = {
                name: stacked([value] * count, order) if isinstance(value, torch.Tensor) else value
                for name, value in c.items()
            }
            out = apply_model(stacked(some, order), stacked([t] * count, order), **arguments)
            painted += unstacked(out, count, order)
        across = x.shape[3] // 16
        bands = [torch.cat(painted[i : i + across], 3) for i in range(0, len(painted), across)]
        return torch.cat(bands, 2).roll(-roll, 3)

    tiled_model = model.clone()
    tiled_model.set_model_unet_function_wrapper(wrapper)
    return tiled_model


@pytest.mark.parametrize("order", ["tile-major", "batch-major"])
@pytest.mark.parametrize("side", SIDES)
def test_how_many_tiles_are_painted_at_once_changes_nothing(apply_user, model, users, side, order):
    options = {"size": SIZE, "batch": 2}
    plain = studio.latents(tiled(model, 1, order, height=8), **options)
    one, two, four = (
        studio.latents(apply_user(tiled(model, at_once, order, height=8), users[0], apply_to=side), **options)
        for at_once in (1, 2, 4)
    )
    assert close(one, two) and close(one, four)
    for half in (LEFT, RIGHT):
        assert studio.far(one[half], plain[half])


@pytest.mark.parametrize("order", ["tile-major", "batch-major"])
def test_item_weights_stay_with_their_items_in_stacked_tiles(apply_user, model, users, order):
    plain = studio.latents(tiled(model, 2, order), batch=2, size=SIZE)
    every = studio.latents(apply_user(tiled(model, 2, order), users[0]), batch=2, size=SIZE)
    first = studio.latents(apply_user(tiled(model, 2, order), users[0], item_weights="0=1, 1=0"), batch=2, size=SIZE)
    assert close(first[1], plain[1]) and close(first[0], every[0]) and studio.far(every[1], plain[1])


@pytest.mark.parametrize("order", ["tile-major", "batch-major"])
@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("roll", [0, 5])
def test_a_mask_lies_on_the_whole_canvas_under_tiles(apply_user, model, users, at_once, roll, order):
    """With the picture turned first, tiles go over its edge."""
    make = {"at_once": at_once, "roll": roll, "order": order}
    options = {"size": SIZE, "batch": 2}
    plain = studio.latents(tiled(model, **make), **options)
    every = studio.latents(apply_user(tiled(model, **make), users[0]), **options)
    assert studio.far(every, plain)
    for level in (0.0, 1.0):
        mask = torch.full((1, 64, 128), level)
        mask[0, 0, 0] = 1 - level  # not quite level
        near = studio.latents(apply_user(tiled(model, **make), users[0], attn_mask=mask), **options)
        assert (near - (every if level else plain)).abs().mean() < 0.05 * (every - plain).abs().mean()
    if roll == 0:
        left = studio.latents(apply_user(tiled(model, **make), users[0], attn_mask=half_mask("left")), **options)
        assert close(left[LEFT], every[LEFT]) and close(left[RIGHT], plain[RIGHT])


def test_a_mask_under_tiles_of_unknown_place_is_refused_and_a_level_one_is_not(
    apply_user, model, users, layout_error, one_sentence
):
    """Tiles that are no part of the latent, such as ones that were made larger or given other noise."""

    def blind(at_once):
        return tiled(model, at_once, change=lambda tile: tile * 1.01)

    with pytest.raises(layout_error, match="attn_mask .* leave the mask out") as raised:
        studio.latents(apply_user(blind(2), users[0], attn_mask=half_mask("left")), size=SIZE)
    one_sentence(raised)
    half = [
        studio.latents(apply_user(blind(n), users[0], attn_mask=torch.full((1, 64, 128), 0.5)), size=SIZE)
        for n in (1, 2)
    ]
    assert close(*half) and close(half[0], studio.latents(apply_user(blind(1), users[0], 0.5), size=SIZE))


def test_a_picture_that_is_turned_whole_takes_the_mask_along(apply_user, model, users):
    def turned(apply_model, args):
        return apply_model(args["input"].roll(16, 3), args["timestep"], **args["c"]).roll(-16, 3)

    seamless = model.clone()
    seamless.set_model_unet_function_wrapper(turned)
    plain, left, right, swapped = (
        studio.latents(m, size=SIZE, steps=1)
        for m in (
            seamless,
            apply_user(seamless, users[0], attn_mask=half_mask("left")),
            apply_user(seamless, users[0], attn_mask=half_mask("right")),
            apply_user(model, users[0], attn_mask=half_mask("left")),
        )
    )
    for masked, inside, outside in ((left, LEFT, RIGHT), (right, RIGHT, LEFT)):
        assert (masked - plain)[inside].abs().mean() > 1.5 * (masked - plain)[outside].abs().mean()
    assert studio.far(swapped, left)


def test_a_wrapper_that_changes_the_latent_s_values_leaves_the_mask_where_it_was(apply_user, model, users):
    def louder(apply_model, args):
        return apply_model(args["input"] * 1.01, args["timestep"], **args["c"])

    def also_wrapped(model):
        wrapped = model.clone()
        wrapped.set_model_unet_function_wrapper(louder)
        return wrapped

    plain, every, left = (
        studio.latents(also_wrapped(m), size=SIZE, steps=1)
        for m in (model, apply_user(model, users[0]), apply_user(model, users[0], attn_mask=half_mask("left")))
    )
    assert studio.far(left, plain) and studio.far(left, every)
    assert (left - plain)[LEFT].abs().mean() > 1.5 * (left - plain)[RIGHT].abs().mean()


def test_a_mask_under_tiles_is_found_with_the_text_alone_where_there_is_one_picture(apply_user, model, users):
    by_marks, by_text = (
        studio.latents(apply_user(tiled(model, 2, carry=carry), users[0], attn_mask=half_mask("left")), size=SIZE)
        for carry in (None, ["c_crossattn"])
    )
    assert close(by_text, by_marks) and studio.far(by_marks, studio.latents(tiled(model, 2), size=SIZE))


def test_a_tile_is_found_by_its_pixels_alone(pack):
    place_of = pack("prefgen.comfy.layout").place_of
    canvas = torch.randn(4, 9, 13)
    for top, left in ((0, 0), (2, 5), (7, 11)):
        tile = canvas.roll((-top, -left), (1, 2))[:, :4, :6]
        assert place_of(tile, canvas).tolist() == [1, top, left]
        tile = tile.clone()
        tile[0, 1, 2] += 1e-3
        assert place_of(tile, canvas)[0] == 0
    assert place_of(torch.zeros(4, 2, 2), torch.zeros(4, 3, 3))[0] != 1, "everywhere is nowhere"
    assert place_of(torch.zeros(4, 5, 2), torch.zeros(4, 3, 3))[0] == 0


@pytest.mark.parametrize("side", SIDES)
def test_tiles_of_a_wrapper_that_hands_on_the_text_alone_are_known_by_it(apply_user, model, users, side):
    one, two = (
        studio.latents(apply_user(tiled(model, n, carry=["c_crossattn"]), users[0], apply_to=side), size=SIZE)
        for n in (1, 2)
    )
    expected = studio.latents(apply_user(tiled(model, 2), users[0], apply_to=side), size=SIZE)
    assert close(one, two) and close(two, expected)


def test_what_nobody_can_tell_is_refused_before_anything_is_painted(
    apply_user, model, users, layout_error, one_sentence
):
    """The prompt is the negative prompt, and the marks are lost."""
    positive, _ = studio.conditions(model)
    astray = apply_user(tiled(model, 2, carry=["c_crossattn"]), users[0])
    with pytest.raises(layout_error, match="belong to the prompt .* paint one at a time") as raised:
        studio.latents(astray, size=SIZE, conds=(positive, positive))
    one_sentence(raised)
    with pytest.raises(layout_error, match="item_weights"):
        weighted = apply_user(tiled(model, 2, carry=["c_crossattn"]), users[0], item_weights="0=1, 1=0")
        studio.latents(weighted, batch=2, size=SIZE)


def test_a_node_that_calls_the_model_without_its_options_is_named(apply_user, model, users, layout_error, one_sentence):
    """No patch of any pack is asked then: the picture would be the plain one."""
    bare = model.clone()
    bare.set_model_unet_function_wrapper(
        lambda apply_model, args: apply_model(args["input"], args["timestep"], c_crossattn=args["c"]["c_crossattn"])
    )
    assert torch.isfinite(studio.latents(bare)).all()
    with pytest.raises(layout_error, match="has no effect") as raised:
        studio.latents(apply_user(bare, users[0]))
    one_sentence(raised)


@pytest.mark.parametrize("side", SIDES)
def test_a_wrapper_that_paints_the_halves_apart_changes_nothing(apply_user, model, users, side):
    def apart(apply_model, args):
        x, t, c, count = args["input"], args["timestep"], args["c"], len(args["cond_or_uncond"])
        painted = []
        for number in range(count):
            own = {k: v.chunk(count)[number] if isinstance(v, torch.Tensor) else v for k, v in c.items()}
            painted.append(apply_model(x.chunk(count)[number], t.chunk(count)[number], **own))
        return torch.cat(painted)

    split = model.clone()
    split.set_model_unet_function_wrapper(apart)
    options = {"apply_to": side, "item_weights": "0=1, 1=0.3", "attn_mask": torch.rand(2, 32, 32)}
    together = studio.latents(apply_user(model, users[0], **options), batch=2)
    assert close(studio.latents(apply_user(split, users[0], **options), batch=2), together)


def coupled(model, regions, mask=None, order="repeat"):
    """Attention couple: the rows of the prompt once a region, their results added up."""
    shares = torch.full((regions,), 1 / regions) if mask is None else mask

    def spread(q, k, v, extra):
        kinds = extra["cond_or_uncond"]
        parts = [
            [
                c if kind == 1 else repeated(c, regions, order)
                for kind, c in zip(kinds, x.chunk(len(kinds)), strict=True)
            ]
            for x in (q, k, v)
        ]
        return tuple(torch.cat(part) for part in parts)

    def gather(out, extra):
        kinds = extra["cond_or_uncond"]
        sizes = [1 if kind == 1 else regions for kind in kinds]
        each = out.shape[0] // sum(sizes)
        done = []
        for kind, part in zip(kinds, out.split([size * each for size in sizes]), strict=True):
            if kind == 1:
                done.append(part)
                continue
            by_region = part.chunk(regions) if order == "repeat" else part.unflatten(0, (-1, regions)).unbind(1)
            done.append(sum(share * region for share, region in zip(shares, by_region, strict=True)))
        return torch.cat(done)

    couple = model.clone()
    couple.set_model_attn2_patch(spread)
    couple.set_model_attn2_output_patch(gather)
    return couple


def repeated(rows, regions, order):
    return rows.repeat(regions, 1, 1) if order == "repeat" else rows.repeat_interleave(regions, 0)


@pytest.mark.parametrize("order", ["repeat", "interleave"])
@pytest.mark.parametrize("regions", [2, 3, 4, 5])
@pytest.mark.parametrize("side", SIDES)
def test_the_same_prompt_in_every_region_is_no_regions(apply_user, model, users, regions, side, order):
    plain, expected = studio.latents(model, 2), studio.latents(apply_user(model, users[0], apply_to=side), 2)
    regional = studio.latents(apply_user(coupled(model, regions, order=order), users[0], apply_to=side), 2)
    assert close(regional, expected) and studio.far(expected, plain)
    after = coupled(apply_user(model, users[0], apply_to=side), regions, order=order)
    assert close(studio.latents(after, 2), expected), "the order of the nodes doesn't matter"


def test_masks_and_item_weights_go_into_every_region(apply_user, model, users):
    options = {"attn_mask": torch.rand(2, 64, 64), "item_weights": "0=1, 1=0.2"}
    expected = studio.latents(apply_user(model, users[0], **options), 2)
    assert close(studio.latents(apply_user(coupled(model, 3), users[0], **options), 2), expected)


def test_regions_and_stacked_tiles_together(apply_user, model, users):
    one, two = (studio.latents(apply_user(coupled(tiled(model, n), 2), users[0]), size=SIZE) for n in (1, 2))
    plain = studio.latents(tiled(model, 1), size=SIZE)
    expected = studio.latents(apply_user(tiled(model, 1), users[0]), size=SIZE)
    assert close(one, expected) and studio.far(expected, plain)
    # This couple takes the batch for as many chunks as there are conditions, which two tiles at once are not.
    assert two.shape == one.shape


def test_a_patch_that_swaps_rows_takes_their_users_along(apply_user, model, users):
    def swap(q, k, v, extra):
        return q.flip(0), k.flip(0), v.flip(0)

    swapped = model.clone()
    swapped.set_model_attn2_patch(swap)
    swapped.set_model_attn2_output_patch(lambda out, extra: out.flip(0))
    expected = studio.latents(apply_user(model, users[0], item_weights="0=1, 1=0.3"), 2)
    assert close(studio.latents(apply_user(swapped, users[0], item_weights="0=1, 1=0.3"), 2), expected)


def test_a_patch_that_mixes_rows_is_refused_and_one_that_leaves_them_is_not(
    apply_user, model, users, layout_error, one_sentence
):
    mixed, scaled, inside = model.clone(), model.clone(), model.clone()
    mixed.set_model_attn2_patch(lambda q, k, v, extra: (q.mean(0, keepdim=True).expand_as(q), k, v))
    scaled.set_model_attn2_patch(lambda q, k, v, extra: (q * 1.5, k * 0.5, v))
    with pytest.raises(layout_error, match="another node makes of the 2 rows") as raised:
        studio.latents(apply_user(mixed, users[0]))
    one_sentence(raised)
    assert studio.far(studio.latents(apply_user(scaled, users[0])), studio.latents(scaled))
    # A pack that doubles the batch inside the model, where no patch of ours sees it.
    inner = inside.model.diffusion_model
    try:
        inside.add_wrapper_with_key(
            "diffusion_model",
            "doubling",
            lambda executor, x, t, context, *rest, **more: executor(
                x.repeat(2, 1, 1, 1), t.repeat(2), context.repeat(2, 1, 1), *rest, **more
            )[: x.shape[0]],
        )
        with pytest.raises(layout_error, match="was called with 2"):
            studio.latents(apply_user(inside, users[0]))
    finally:
        assert inside.model.diffusion_model is inner


def test_a_node_that_puts_its_own_function_in_an_attention_s_place_is_named(
    apply_user, model, users, layout_error, one_sentence
):
    """As older attention couples do: ComfyUI doesn't call it where a block's attention is replaced, so the regions
    would be lost without a word."""
    hooked = model.clone()
    attention = hooked.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn2
    forward = attention.forward
    hooked.add_object_patch(
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.forward", lambda *a, **k: forward(*a, **k)
    )
    with pytest.raises(layout_error, match="in the place of a cross-attention") as raised:
        studio.latents(apply_user(hooked, users[0]))
    one_sentence(raised)
    assert torch.isfinite(studio.latents(apply_user(model, users[0]))).all(), "the patch goes with its model"


def area(model, x, width, **extra):
    """A prompt that fills a part of the picture, as ConditioningSetArea makes it."""
    positive, negative = studio.conditions(model)
    for _, settings in positive:
        settings |= {"area": (16, width, 0, x), "set_area_to_bounds": False, "strength": 1.0} | extra
    return positive, negative


@pytest.mark.parametrize("at_once", [None, 1])
def test_a_mask_and_an_area_that_do_not_meet_leave_the_picture_alone(apply_user, model, users, at_once):
    """The area's crop is a part of the canvas: ssitu/ComfyUI_UltimateSDUpscale #87."""
    chain = model if at_once is None else tiled(model, at_once)
    right = area(model, 16, 16)
    plain = studio.latents(chain, conds=right, size=SIZE)
    masked = {
        side: studio.latents(apply_user(chain, users[0], attn_mask=half_mask(side)), conds=right, size=SIZE)
        for side in ("left", "right")
    }
    every = studio.latents(apply_user(chain, users[0]), conds=right, size=SIZE)
    assert close(masked["left"], plain)
    assert close(masked["right"][RIGHT], every[RIGHT]) and studio.far(every[RIGHT], plain[RIGHT])


def test_several_prompts_of_different_length_with_areas_and_masks_share_one_user(apply_user, model, users):
    (text, settings), negative = studio.conditions(model)[0][0], studio.conditions(model)[1]
    longer = torch.cat([text, text], 1)
    mask = torch.zeros(1, *SIZE)
    mask[..., :16] = 1
    prompts = [
        [text, settings | {"area": (16, 16, 0, 0), "strength": 1.0}],
        [longer, settings | {"area": (16, 16, 0, 16), "strength": 1.0}],
        [text, settings | {"mask": mask, "mask_strength": 1.0}],
    ]
    plain = studio.latents(model, conds=(prompts, negative), size=SIZE)
    every = studio.latents(apply_user(model, users[0]), conds=(prompts, negative), size=SIZE)
    left = apply_user(apply_user(model, users[0], attn_mask=half_mask("left")), users[0], attn_mask=half_mask("right"))
    assert studio.far(every, plain)
    # Two halves of a mask make a whole one, in every area.
    assert close(studio.latents(left, conds=(prompts, negative), size=SIZE), every)


class AnchoredWindows(comfy.context_windows.IndexListContextHandler):
    """Context windows as ComfyUI 0.33 has them: with the item before the window in front (causal_window_fix), and with
    items that every window retains (latent_retain_index_list)."""

    latent_retain_index_list = ()
    causal_window_fix = True

    def set_step(self, timestep, model_options):
        super().set_step(timestep[:1], model_options)

    def execute(self, calc_cond_batch, model, conds, x_in, timestep, model_options):
        self.set_step(timestep, model_options)
        out = [torch.zeros_like(x_in) for _ in conds]
        for window in self.get_context_windows(model, x_in, model_options):
            shown = list(window.index_list)
            anchor = shown[0] - 1
            if self.causal_window_fix and anchor >= 0:
                window.causal_anchor_index = anchor
                shown = [anchor, *shown]
            x = x_in[shown]
            for number in self.latent_retain_index_list:
                x[number] = x_in[number]
            model_options["transformer_options"]["context_window"] = window
            for total, part in zip(out, calc_cond_batch(model, conds, x, timestep[shown], model_options), strict=True):
                total[window.index_list] = part[len(shown) - len(window.index_list) :]
        return out


def windowed(model, length, retain=()):
    handler = AnchoredWindows(
        comfy.context_windows.get_matching_context_schedule("batched"),
        comfy.context_windows.get_matching_fuse_method("flat"),
        length,
    )
    handler.latent_retain_index_list = list(retain)
    model = model.clone()
    model.model_options["context_handler"] = handler
    return model


@pytest.mark.parametrize("length, batch", [(2, 4), (3, 4), (3, 6)])
def test_in_windows_with_the_item_before_them_every_frame_keeps_its_own_user_and_mask(
    apply_user, model, users, length, batch
):
    """Of 4 items a window of 3 and its anchor are as many as the whole batch."""
    masks = torch.zeros(batch, 32, 32)
    masks[-1] = 1
    two_users = apply_user(apply_user(model, users[0], item_weights="1=1, 2=0"), users[1], item_weights="1=0, 2=1")
    for patched in (two_users, apply_user(model, users[0], attn_mask=masks)):
        assert close(studio.latents(windowed(patched, length), batch), studio.latents(patched, batch))
    plain = studio.latents(model, batch)
    assert studio.far(studio.latents(windowed(two_users, length), batch)[-1], plain[-1])


def test_items_that_every_window_retains_keep_their_own_user(pack):
    items_of = pack("prefgen.comfy.layout").items_of

    class Window:
        index_list, dim, causal_anchor_index = [4, 5, 6], 0, 3

    assert items_of({"context_window": Window}, 4, 7, [0, 1]) == (0, 1, 5, 6)
    assert items_of({"context_window": Window}, 7, 7, [0, 1]) == tuple(range(7)), "the whole batch: no window is open"


def test_a_window_that_shows_more_than_it_says_is_not_guessed(pack, apply_user, model, users, layout_error):
    items_of = pack("prefgen.comfy.layout").items_of

    class Window:
        index_list, dim = [4, 5, 6], 0

    assert items_of({"context_window": Window}, 4, 7) == items_of({"context_window": Window}, 4) == (None,) * 4

    def part(args):
        some = args | {"input": args["input"][:3], "sigma": args["sigma"][:3]}
        painted = comfy.samplers.calc_cond_batch(
            *(some[k] for k in ("model", "conds", "input", "sigma", "model_options"))
        )
        return [torch.cat([out, out[:1]]) for out in painted]

    silent = model.clone()
    silent.model_options["sampler_calc_cond_batch_function"] = part
    with pytest.raises(layout_error, match="item_weights"):
        studio.latents(apply_user(silent, users[0], item_weights="0=1, 3=0"), 4)
    assert studio.far(studio.latents(apply_user(silent, users[0]), 4), studio.latents(silent, 4))


@pytest.mark.parametrize("side", SIDES)
def test_halves_that_are_painted_by_threads_are_the_same(apply_user, model, users, side):
    """As ComfyUI 0.23 and newer do it with several cards."""

    def in_threads(args):
        painted = {}

        def paint(number):
            group = [cond if i == number else None for i, cond in enumerate(args["conds"])]
            with torch.no_grad():
                painted[number] = comfy.samplers.calc_cond_batch(
                    args["model"], group, args["input"], args["sigma"], args["model_options"]
                )[number]

        threads = [threading.Thread(target=paint, args=(number,)) for number in range(len(args["conds"]))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [painted[number] for number in range(len(threads))]

    options = {
        "apply_to": side,
        "item_weights": "0=1, 1=0.2",
        "attn_mask": torch.rand(2, 32, 32),
        "weight_schedule": "0=1, 1=0.2",
    }
    split = model.clone()
    split.model_options["sampler_calc_cond_batch_function"] = in_threads
    together = studio.latents(apply_user(model, users[0], **options), batch=2)
    assert close(studio.latents(apply_user(split, users[0], **options), batch=2), together)


def test_a_pack_that_stacks_the_conditions_itself_gets_the_users_of_its_halves(apply_user, model, users, layout_error):
    """Its own copy of ComfyUI's calc_cond_batch, without the wrappers."""

    def own(args):
        conds, x = args["conds"], args["input"]
        options = args["model_options"]["transformer_options"] | {
            "cond_or_uncond": [1, 0],
            "uuids": [conds[1][0]["uuid"], conds[0][0]["uuid"]],
            "sigmas": args["sigma"],
        }
        text = torch.cat([conds[i][0]["model_conds"]["c_crossattn"].cond.expand(len(x), -1, -1) for i in (1, 0)])
        out = args["model"].apply_model(
            torch.cat([x, x]), args["sigma"].repeat(2), c_crossattn=text, transformer_options=options
        )
        return out.chunk(2)[::-1]

    stacking = model.clone()
    stacking.model_options["sampler_calc_cond_batch_function"] = own
    expected = studio.latents(apply_user(model, users[0], attn_mask=half_mask("left")), 2, size=SIZE)
    assert close(studio.latents(apply_user(stacking, users[0], attn_mask=half_mask("left")), 2, size=SIZE), expected)

    def doubled(args):
        return own(args | {"input": torch.cat([args["input"]] * 2), "sigma": args["sigma"].repeat(2)})

    stacking.model_options["sampler_calc_cond_batch_function"] = doubled
    with pytest.raises(layout_error, match="8 latents"):
        studio.latents(apply_user(stacking, users[0]), 2)


@pytest.mark.parametrize("size", [(23, 14), (19, 18), (16, 16)])
def test_a_mask_follows_kohya_s_deep_shrink(apply_user, model, users, size):
    """Odd latents that are shrunk in the middle of the model (cubiq/ComfyUI_IPAdapter_plus #97): from the number of
    tokens alone, the sides of 23 x 14 can't be told and those of 19 x 18 are told wrongly."""
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

    node = PatchModelAddDownscale()
    run = getattr(node, "patch", None) or PatchModelAddDownscale.execute
    shrunk = run(model, 3, 2.0, 0.0, 1.0, True, "bicubic", "bicubic")
    shrunk = shrunk[0] if isinstance(shrunk, tuple) else shrunk.result[0]
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    options = {"size": size, "steps": 1}
    plain, every = (studio.latents(m, **options) for m in (shrunk, apply_user(shrunk, users[0])))
    left = studio.latents(apply_user(shrunk, users[0], attn_mask=mask), **options)
    ones = studio.latents(apply_user(shrunk, users[0], attn_mask=torch.ones(1, 8, 8)), **options)
    assert torch.equal(ones, every) and studio.far(every, plain)
    assert studio.far(left, plain) and studio.far(left, every)


def test_a_guider_that_samples_with_another_model_too_marks_its_calls(apply_user, model, users):
    """The negative prompt by the plain model, as in autoguidance: its calls carry marks that it doesn't know."""
    patched = apply_user(model, users[0])

    def split(args):
        both = args["conds"]
        positive = comfy.samplers.calc_cond_batch(
            args["model"], [both[0], None], args["input"], args["sigma"], args["model_options"]
        )[0]
        plain_options = args["model_options"] | {
            "transformer_options": {
                k: v
                for k, v in args["model_options"]["transformer_options"].items()
                if k not in ("wrappers", "prefgen")
            }
        }
        negative = comfy.samplers.calc_cond_batch(
            args["model"], [None, both[1]], args["input"], args["sigma"], plain_options
        )[1]
        return [positive, negative]

    autoguided = patched.clone()
    autoguided.model_options["sampler_calc_cond_batch_function"] = split
    assert close(studio.latents(autoguided), studio.latents(patched))
