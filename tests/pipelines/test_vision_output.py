"""What is seen in images, as an output: which images are meant, what is right, what is told."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_vision
import torch
from PIL import Image

from accel.choice import DENSE
from accel.errors import AccelError
from accel.pipelines.adapters import geometry_of
from accel.pipelines.enable import enabled
from accel.pipelines.host import Host
from accel.pipelines.model_settings import model_config
from accel.pipelines.vision_images import ImageFolder, folder_of
from accel.pipelines.vision_output import ClassesOutput, Seen
from accel.pipelines.vision_scores import counts_of, scores_of
from accel.plan import Plan
from accel.schedule import Schedule
from accel.window_keeps import WindowKeeps

VISION = ClassesOutput()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_vision.tiny_vision_path(folder / name, name) for name in ("swin", "vit")}


@pytest.fixture(scope="module")
def host(paths):
    return Host(model_config(tiny_vision.tiny_vision_config(paths["swin"])))


def test_prompts_are_groups_of_images(host, paths):
    config = host.config
    assert config.prompts == ("test/000-005",)
    assert config.calibration == ("calibration/000-001",)
    assert (config.kind.name, config.steps) == ("vision", 1)
    assert replace(config, prompts=("test/003",)).prompts == ("test/003",)
    alone = replace(config, calibration=(), calibration_images="")
    assert (alone.prompts, alone.calibration) == (config.prompts, ())
    names = tuple(f"{n:03d}" for n in range(21))
    folder = replace(ImageFolder.of(config.images), names=names)
    eights = ("test/000-007", "test/008-015")
    assert folder.groups(1) == folder.groups(8) == folder.groups(2) == eights
    assert folder.groups(3)[:2] == ("test/000-005", "test/006-011")
    assert folder.groups(20) == ("test/000-019",)
    assert folder.groups(99) == ("test/000-020",)
    assert replace(folder, names=("a-b", "c")).groups(1) == ("test/a-b-c",)
    assert replace(folder, names=("a-b", "c")).members("a-b-c") == ("a-b", "c")


def test_names_of_images_are_found_in_their_folder(host):
    images, calibration = host.config.images, host.config.calibration_images
    folder, group = folder_of("calibration/001", images, calibration)
    assert folder.members(group) == ("001",)
    folder, group = folder_of("001-003", images, calibration)
    assert folder.path.name == "test"
    assert folder.members(group) == ("001", "002", "003")
    for prompt, told in (
        ("elsewhere/001", "of no folder here; .*Known: calibration, test"),
        ("test/003-001", "no images '003-001'.*the first and the last one as 000-005"),
        ("test/009", "no images '009'"),
    ):
        with pytest.raises(AccelError, match=told):
            host.generate(prompt, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"call": {}}, "model.call.batch_size is None; it is a whole number"),
        ({"images": "", "prompts": ()}, "model.prompts must be prompts with text"),
        ({"images": "nowhere", "prompts": ()}, "there is no folder 'nowhere' with images"),
        ({"calibration_images": "x/test"}, "are both called 'test'"),
    ],
)
def test_what_a_configuration_lacks_is_named(host, changes, message):
    with pytest.raises(AccelError, match=message):
        replace(host.config, **changes)


def test_a_generation_is_what_the_pipeline_sees(host, tmp_path):
    made = host.generate("test/001-003", 0)
    pixels = tiny_vision.images(6, seed=1)[1:4]
    assert np.array_equal(made.labels, host.pipe(pixels).labels.numpy())
    assert VISION.counts(made) == {"images": 3, "calls": 2}
    VISION.save(tmp_path / "s.npz", made, host, "test/001-003")
    back = VISION.load(tmp_path / "s.npz")
    assert np.array_equal(back.labels, made.labels)
    assert (back.calls, back.windows) == (2, {})


def test_an_image_of_ones_own_is_given_by_its_path(host):
    made = host.generate(f"{host.config.images}/004.png", 0)
    assert np.array_equal(made.labels, host.generate("test/004", 0).labels)


def test_images_of_several_sizes_are_given_as_they_are(paths, tmp_path):
    for number, size in enumerate(((48, 32), (60, 40))):
        Image.new("RGB", size, (90 * number, 20, 30)).save(tmp_path / f"{number}.png")
    config = tiny_vision.tiny_vision_config(paths["vit"]) | {"images": str(tmp_path)}
    host = Host(model_config(config))
    assert host.generate(host.config.prompts[0], 0).labels.shape == (2,)


def test_kept_windows_are_kept(host, tmp_path):
    geometry = geometry_of(host.pipe)
    windows = WindowKeeps({site.name: 0.5 for site in geometry.sites if "layers.0" in site.name})
    plan = Plan.uniform("half", geometry, DENSE, schedule=Schedule(0.0), windows=windows)
    with enabled(host.pipe, plan):
        VISION.save(tmp_path / "s.npz", host.generate("test/001-003", 0), host, "test/001-003")
    ((stage, kept),) = VISION.load(tmp_path / "s.npz").windows.items()
    assert stage == "layers.0"
    assert kept.shape == (3, 2, 3)  # 32 x 48 pixels, in windows of 16 x 16; batches of two
    assert kept.sum((1, 2)).tolist() == [3, 3, 3]
    assert not (kept == kept[0]).all()


def test_counts_are_those_of_pixels_that_are_asked_for():
    right = np.array([[[0, 0, 1], [255, 1, 2]]])
    found = np.array([[[0, 1, 1], [2, 1, 0]]])
    told = counts_of(found, right, 4)
    assert told == {"both": [1, 2, 0, 0], "either": [3, 3, 1, 0], "places": 5}
    # 255 is a class like any other of a classifier
    assert counts_of(np.array([255]), np.array([255]), 256)["both"][255] == 1


def test_scores_are_of_all_images_together():
    classes = ("a", "b", "c", "d")
    one = {"both": [1, 2, 0, 0], "either": [3, 3, 1, 0], "places": 5}
    two = {"both": [5, 0, 0, 0], "either": [5, 1, 3, 0], "places": 9}
    told = scores_of([one, two], classes)
    assert told["iou"] == {"a": 6 / 8, "b": 2 / 4, "c": 0.0}  # nobody has any d
    assert told["miou"] == pytest.approx((6 / 8 + 2 / 4) / 3)
    assert told["right"] == pytest.approx(8 / 14)
    assert scores_of([], classes) == {"right": None, "iou": {}, "miou": None}


def test_what_is_seen_is_judged_by_what_is_right_and_by_dense(host):
    judge = VISION.judge(host.config)
    prompt = "test/000-002"
    dense = host.generate(prompt, 0)
    right = judge.right(prompt)
    assert (right[:, :8] == 255).all()
    told = VISION.judged(dense, None, prompt, judge)
    asked = right != 255
    assert told["counts"]["places"] == asked.sum() == 3 * 24 * 48
    assert sum(told["counts"]["both"]) == (dense.labels == right)[asked].sum() == 3 * 20 * 48
    assert told["agreement"] is None
    other = Seen(dense.labels.copy())
    other.labels[0, 0, :36] += 1
    told = VISION.judged(other, dense, prompt, judge)
    assert told["agreement"] == pytest.approx(1 - 36 / dense.labels.size)
    with pytest.raises(AccelError, match="as large as their images"):
        VISION.judged(Seen(dense.labels[:, 1:]), None, prompt, judge)


def test_classes_of_images_are_judged_by_their_names(paths):
    config = model_config(tiny_vision.tiny_vision_config(paths["vit"], 4))
    host, judge = Host(config), VISION.judge(config)
    made = host.generate("test/000-005", 0)
    assert VISION.counts(made) == {"images": 6, "calls": 2}
    judged = VISION.judged(made, made, "test/000-005", judge)
    record = {"seconds": 0.5, "images": 6, "calls": 2, "summary": None}
    told = VISION.results([judged], [judged], {0: [record]})
    assert told["top1"] == told["score"] == pytest.approx(5 / 6)
    assert told["miou"] is told["pixel_accuracy"] is None
    assert told["iou"] == {}
    assert told["images_per_second"] == 12
    assert told["batch_seconds"] == 0.25
    assert told["score_change"] == 0
    assert told["agreement"] == {"mean": 1.0, "worst": 1.0}


def test_results_differ_from_dense_by_the_images_that_both_saw():
    def judged(both, either):
        counts = {"both": both, "either": either, "places": 10}
        common = {"classes": ["a", "b"], "task": "segmentation"}
        return {"counts": counts, "agreement": 0.5, **common}

    dense = [judged([5, 4], [6, 5]), judged([1, 1], [9, 9])]
    told = VISION.results([judged([4, 4], [6, 6]), None], dense, {0: [], 1: []})
    assert told["miou"] == told["score"] == pytest.approx(4 / 6)
    assert told["score_change"] == pytest.approx(4 / 6 - (5 / 6 + 4 / 5) / 2)
    assert told["images_per_second"] is None
    nothing = VISION.results([None], [None], {0: []})
    assert nothing.pop("iou") == {}
    assert set(nothing.values()) == {None}


def test_other_answers_judge_anew_and_other_images_are_measured_anew(paths, tmp_path):
    config = model_config(tiny_vision.tiny_vision_config(paths["swin"]))
    folder = tmp_path / "test"
    folder.mkdir()
    for file in ImageFolder.of(config.images).path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    moved = replace(config, images=str(folder))
    for told in (VISION.judges, lambda c: VISION.stands_for(c, "test/000-002")):
        assert told(moved) == told(config)
    (folder / "001-classes.png").write_bytes((folder / "000-classes.png").read_bytes())
    assert VISION.judges(moved) != VISION.judges(config)
    (folder / "001.png").write_bytes((folder / "000.png").read_bytes())
    assert VISION.stands_for(moved, "test/000-002") != VISION.stands_for(config, "test/000-002")
    assert VISION.stands_for(moved, "test/002") == VISION.stands_for(config, "test/002")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("swin", np.full((32, 48), 5), "has class 5; the model has 5 classes"),
        ("swin", np.zeros((32, 40)), "no map of classes"),
        ("vit", {"000": "rad"}, "lacks the key '001'"),
        ("vit", {f"{n:03d}": "rad" for n in range(6)}, "000 is 'rad'; did you mean 'red'"),
        ("vit", [1], "must be a table"),
    ],
)
def test_wrong_answers_are_refused(paths, tmp_path, name, content, told):
    classes = tiny_vision.CLASSES
    for file in ImageFolder.of(f"{paths[name]}/test").path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if name == "vit":
        (tmp_path / "labels.json").write_text(json.dumps(content))
    else:
        Image.fromarray(content.astype(np.uint8)).save(tmp_path / "001-classes.png")
    task = {"vit": "classification", "swin": "segmentation"}[name]
    with pytest.raises(AccelError, match=told):
        ImageFolder.of(str(tmp_path)).right("000-005", classes, task)


def test_folders_without_answers_have_none(paths, tmp_path):
    for number in range(2):
        Image.new("RGB", (48, 32)).save(tmp_path / f"{number}.png")
    config = replace(
        model_config(tiny_vision.tiny_vision_config(paths["swin"])),
        images=str(tmp_path),
        prompts=("0-1",),
    )
    judge = VISION.judge(config)
    judged = VISION.judged(Seen(np.zeros((2, 32, 48), int)), None, "0-1", judge)
    assert judged["counts"] is None
    assert VISION.results([judged], [judged], {0: []})["score"] is None


def test_fused_models_call_sdpa_wherever_timm_has_it(paths, monkeypatch):
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs),
    )
    host = Host(model_config(tiny_vision.tiny_vision_config(paths["swin"])))
    other = Host(host.config)
    pixels = tiny_vision.images(3)
    before = host.pipe(pixels, output_type="logits").logits
    assert calls == []
    VISION.set_up(host, VISION.setup("fused", {}))
    after = host.pipe(pixels, output_type="logits").logits
    assert len(calls) == 5  # once a block
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    other.pipe(pixels)
    assert len(calls) == 5  # another model of the same class is as it was


@pytest.mark.filterwarnings("ignore:.*(non-contiguous|non-tuple sequence)")
@pytest.mark.parametrize("name", ["swin", "vit"])
def test_a_smaller_input_has_whole_patches(paths, name):
    host = Host(model_config(tiny_vision.tiny_vision_config(paths[name])))
    before = host.generate("test/000-002", 0)
    VISION.set_up(host, {"fused": True, "scale": 0.7})
    assert host.pipe.size == {"swin": (24, 32), "vit": (24, 32)}[name]
    assert VISION.about(host)["image_size"] == [24, 32]
    made = host.generate("test/000-002", 0)
    assert made.labels.shape == before.labels.shape
    VISION.set_up(host, {"scale": 0.01})
    assert host.pipe.size == (host.pipe.patch, host.pipe.patch)


def test_compiled_models_are_compiled_with_their_options(paths):
    host = Host(model_config(tiny_vision.tiny_vision_config(paths["vit"])))
    setup = VISION.setup("compiled", {"backend": "eager"})
    assert setup == {"fused": True, "compile": {"backend": "eager"}}
    before = host.pipe(tiny_vision.images(3), output_type="logits").logits
    VISION.set_up(host, setup)
    assert host.pipe.model._compiled_call_impl is not None
    after = host.pipe(tiny_vision.images(3), output_type="logits").logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_the_table_for_others_has_timms_columns():
    arm = {
        "kind": "dense",
        "images_per_second": 12.3456,
        "batch_seconds": 0.0123,
        "speedup": 1.0,
        "compile_seconds": None,
        "peak_memory_bytes": 3 * 2**20,
        "miou": 0.51234,
        "top1": None,
        "agreement": None,
        "keep": 1.0,
        "about": {"parameters": 1_234_567, "image_size": [32, 48]},
    }
    empty = {**arm, "images_per_second": None, "about": {}, "top1": 0.75, "miou": None}
    settings = {"model": "m", "dtype": "float32", "call": {"batch_size": 2}}
    files = VISION.files({"arms": {"dense": arm, "b": empty}, "settings": settings})
    rows = list(csv.DictReader(io.StringIO(files["results.csv"])))
    assert rows[0]["infer_samples_per_sec"] == "12.35"
    assert rows[0]["infer_step_time"] == "12.3"
    assert rows[0]["infer_img_size"] == "32x48"
    assert rows[0]["miou"] == "51.234"
    assert rows[0]["param_count"] == "1.23"
    assert (rows[1]["top1"], rows[1]["top1_err"], rows[1]["miou"]) == ("75.0", "25.0", "")


def test_a_map_of_classes_is_an_image(host, tmp_path):
    made = host.generate("test/000-002", 0)
    path = VISION.checked_path(str(tmp_path / "made" / "c.png"))
    told = VISION.write(path, made, fps=1, min_side=0)
    present = ", ".join(map(str, np.unique(made.labels)))
    assert told.endswith(f"c.png: classes {present} in 3 images")
    back = np.asarray(Image.open(path)).reshape(-1, 3)
    pairs = {(label, tuple(rgb)) for label, rgb in zip(made.labels.flat, back, strict=True)}
    assert len(pairs) == len(np.unique(made.labels)) > 1  # a colour for each class
    assert VISION.write(None, Seen(np.array([3, 1])), fps=1, min_side=0) == "classes 3, 1"
    with pytest.raises(AccelError, match=r"is not written to 'c\.gif'"):
        VISION.checked_path("c.gif")
