"""Vision pipelines: shapes, files that are read bit for bit, and files that are refused."""

import json

import pytest
import timm
import tiny_vision
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from accel.errors import AccelError
from accel.pipelines.vision import Segmenter, VisionConfig, VisionPipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, pipe in (("swin", tiny_vision.swin()), ("vit", tiny_vision.vit())):
        pipe.save_pretrained(folder / name)
    return folder


def _changed(saved, tmp_path, name="swin", **changes):
    """A copy of a saved model with another configuration."""
    content = json.loads((saved / name / "config.json").read_text())
    for key, value in changes.items():
        where = content
        *path, last = key.split("__")
        for part in path:
            where = where[part]
        where[last] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes((saved / name / "model.safetensors").read_bytes())
    return tmp_path


@pytest.mark.parametrize("size", [(32, 48), (33, 50), (57, 35), (16, 20)])
def test_a_segmentation_has_the_size_of_its_image(size):
    pipe = tiny_vision.swin(dynamic_img_size=True)
    with torch.no_grad():
        assert pipe.model(torch.rand(3, 3, *size)).shape == (3, 5, *size)


def test_missing_rows_and_columns_are_zeros_that_are_cut_off_again():
    model = tiny_vision.swin(dynamic_img_size=True).model
    x = torch.randn(2, 3, 30, 45)
    with torch.no_grad():
        whole = model(F.pad(x, (0, 3, 0, 2)))
        torch.testing.assert_close(model(x), whole[:, :, :30, :45], rtol=0, atol=0)


def test_maps_with_channels_last_are_read_as_maps_with_channels_first():
    first = tiny_vision.swin().model
    args = tiny_vision.SWIN_ARGS
    last = Segmenter(timm.create_model(tiny_vision.SWIN, features_only=True, **args), 5, 12)
    assert last.last
    assert not first.last
    # the same modules under other names, in the same order
    last.load_state_dict(
        dict(zip(last.state_dict(), first.state_dict().values(), strict=True)), strict=True
    )
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(last.eval()(x), first(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_a_saved_model_is_loaded_bit_for_bit(saved, name):
    made = {"swin": tiny_vision.swin, "vit": tiny_vision.vit}[name]()
    loaded = VisionPipeline.from_pretrained(saved / name)
    assert loaded.config == made.config
    x = tiny_vision.images(3)
    before, after = (p(x, output_type="logits").logits for p in (made, loaded))
    assert torch.equal(before, after)
    assert before.std(0).max() > 0  # images differ, so that equality says something


def test_timm_loads_the_folder_of_a_classifier(saved):
    import timm

    model = timm.create_model(f"local-dir:{saved / 'vit'}", pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=model)
    assert tuple(config["input_size"]) == (3, 32, 48)
    assert tuple(config["mean"]) == (0.5, 0.5, 0.5)
    x = tiny_vision.images(3)
    with torch.no_grad():
        found = model((x / 255 - 0.5) / 0.5)
    own = tiny_vision.vit()(x, output_type="logits").logits
    torch.testing.assert_close(found, own)


def test_images_are_taken_as_files_as_pictures_and_as_tensors(saved, tmp_path):
    pipe = tiny_vision.swin()
    x = tiny_vision.images(3)
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in x]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    labels = pipe(x).labels
    assert labels.shape == (3, 32, 48)
    assert len(labels.unique()) > 1
    for given in (pictures, paths, list(map(str, paths)), x / 255):
        assert torch.equal(pipe(given).labels, labels)
    assert torch.equal(pipe(str(paths[1])).labels, labels[1:2])
    assert torch.equal(pipe(x[2]).labels, labels[2:])
    assert torch.equal(pipe(x, batch_size=2).labels, labels)
    assert torch.equal(pipe(x, return_dict=False)[0], labels)


def test_a_segmentation_is_brought_back_to_the_size_of_its_image():
    pipe = tiny_vision.swin()
    x = tiny_vision.images(3, 40, 72)
    found = pipe(x, output_type="logits")
    assert found.labels.shape == (3, 40, 72)
    assert found.logits.shape == (3, 5, 40, 72)
    seen = F.interpolate(x / 255, size=(32, 48), mode="bilinear", antialias=True)
    own = pipe(seen, output_type="logits").logits
    expected = F.interpolate(own, size=(40, 72), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found.logits, expected)


# timm's, where a window is larger than the new map
@pytest.mark.filterwarnings("ignore:.*(non-contiguous|non-tuple sequence)")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("made", [tiny_vision.swin, tiny_vision.vit])
def test_the_input_size_can_be_set(made, dynamic):
    pipe = made(dynamic_img_size=dynamic)
    other = made(size=(24, 40), dynamic_img_size=dynamic, img_size=(24, 40))
    x = tiny_vision.images(3, 32, 48)
    before = pipe(x, output_type="logits").logits
    pipe.set_input_size(24, 40)
    found = pipe(x, output_type="logits").logits
    assert found.shape == before.shape
    assert not torch.equal(found, before)
    if made is tiny_vision.swin:  # whose weights do not depend on the size
        other.model.load_state_dict(pipe.model.state_dict())
        torch.testing.assert_close(other(x, output_type="logits").logits, found, rtol=0, atol=0)
    with pytest.raises(AccelError, match=r"set to images of \(24, 40\)"):
        pipe.save_pretrained("nowhere")


def test_images_of_several_sizes_are_refused_where_they_must_be_one(tmp_path):
    two = [Image.new("RGB", (48, 32)), Image.new("RGB", (40, 32))]
    assert tiny_vision.vit()(two).labels.shape == (2,)
    with pytest.raises(AccelError, match="images of one size"):
        tiny_vision.swin()(two)
    with pytest.raises(AccelError, match="images of one size"):
        tiny_vision.vit()([])
    with pytest.raises(AccelError, match=r"\[batch, 3, height, width\]"):
        tiny_vision.vit()(torch.zeros(2, 1, 32, 48))
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(AccelError, match=r"no.png.*cannot be read"):
        tiny_vision.vit()([tmp_path / "no.png"])
    with pytest.raises(AccelError, match="output_type"):
        tiny_vision.vit()(two, output_type="np")


def test_what_is_loaded_may_be_otherwise(saved):
    loaded = VisionPipeline.from_pretrained(saved / "vit", size=[24, 40], mean=[0.4, 0.5, 0.6])
    assert loaded.config.mean == (0.4, 0.5, 0.6)
    assert loaded.size == (24, 40)
    assert loaded(tiny_vision.images(3)).labels.shape == (3,)
    with pytest.raises(AccelError, match=r"\[height, width\]"):
        VisionPipeline.from_pretrained(saved / "vit", size=32)
    with pytest.raises(AccelError, match=r"model\.load\.sise: .*did you mean 'size'"):
        VisionPipeline.from_pretrained(saved / "vit", sise=3)


def test_models_of_timm_are_known_by_their_names(tmp_path):
    name = "test_vit.r160_in1k"
    pipe = VisionPipeline.from_pretrained(name, pretrained=False)
    assert pipe.size == (160, 160)
    assert pipe.classes[-1] == "999"
    assert pipe.config.mean == (0.5, 0.5, 0.5)
    found = pipe(tiny_vision.images(3), output_type="logits").logits
    assert found.shape == (3, 1000)
    pipe.save_pretrained(tmp_path)
    again = VisionPipeline.from_pretrained(tmp_path)
    assert torch.equal(again(tiny_vision.images(3), output_type="logits").logits, found)


@pytest.mark.parametrize(
    ("mode", "share", "by"),
    [("squash", 1.0, "bilinear"), ("center", 0.875, "bicubic"), ("center", 1.0, "bilinear")],
)
@pytest.mark.parametrize("sides", [(64, 56), (40, 88), (32, 32)])
def test_images_are_prepared_as_timm_does(mode, share, by, sides):
    config = VisionConfig(
        *("test_vit", ("a", "b")),
        size=(32, 32),
        crop_pct=share,
        crop_mode=mode,
        interpolation=by,
        model_args={"img_size": 32},
    )
    pipe = VisionPipeline.create(config)
    entered = []
    pipe.model.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    x = tiny_vision.images(1, *sides)
    picture = Image.fromarray(x[0].permute(1, 2, 0).numpy())
    pipe(picture)
    timms = timm.data.create_transform(
        (3, 32, 32),
        crop_pct=share,
        crop_mode=mode,
        interpolation=by,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    # timm rounds to 8 bits, and cuts off what is beyond them, between its steps
    apart = (entered[0][0] - timms(picture)).abs()
    assert apart.mean() < 0.5 / 127
    assert apart.max() < 10 / 127


def test_a_model_of_one_size_that_timm_cannot_resize_is_left_as_it_is():
    config = VisionConfig("hiera_tiny_224", ("a", "b"), size=(224, 224), model_args=HIERA)
    pipe = VisionPipeline.create(config)
    with pytest.raises(AccelError, match="takes no images of 96 x 96"):
        pipe.set_input_size(96, 96)
    assert pipe.size == (224, 224)


def test_tables_of_a_model_are_bounded(saved, tmp_path):
    """They are in no file of weights, so that shapes do not tell of them."""
    large = VisionConfig("swin_tiny_patch4_window7_224", ("a",), model_args=LARGE)
    with torch.device("meta"):
        model = large.build()
    folder = _changed(saved, tmp_path)
    weights = {name: torch.zeros(weight.shape) for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    large.save(folder, model)
    with pytest.raises(AccelError, match="GiB of masks and tables"):
        VisionPipeline.from_pretrained(folder)


HIERA = {"embed_dim": 16, "stages": (1, 1, 1, 1), "num_heads": 1}
LARGE = {
    **{"img_size": (2048, 2048), "patch_size": 2, "window_size": 32, "embed_dim": 8},
    **{"depths": (2,), "num_heads": (1,)},
}
REFUSED = [
    ({"tasc": "x"}, r"no key 'tasc'; did you mean 'task'\?"),
    ({"task": "segmentatoin"}, "did you mean 'segmentation'"),
    (
        {"architecture": "swin_tiny_patch4_window7_225"},
        "did you mean 'swin_tiny_patch4_window7_224",
    ),
    ({"architecture": "local-dir:/tmp"}, "no tag"),
    ({"model_args__windw_size": 4}, "did you mean 'window_size'"),
    ({"model_args__checkpoint_path": "evil.bin"}, "checkpoint_path is decided elsewhere"),
    ({"model_args__pretrained": True}, "pretrained is decided elsewhere"),
    ({"model_args__img_size": 10**7}, "at most 4096"),
    ({"model_args__embed_dim": 4096}, "but config.json asks for"),
    ({"model_args__depths": {"a": 1}}, "a list of"),
    ({"pretrained_cfg__crop_mode": "centre"}, "did you mean 'center'"),
    ({"pretrained_cfg__interpolation": "cubic"}, "did you mean 'bicubic'"),
    ({"pretrained_cfg__crop_pct": 0}, "a share from"),
    ({"pretrained_cfg__crop_pct": 0.9}, "every pixel of a segmentation"),
    ({"label_names": []}, "1 to 65536 names"),
    ({"label_names": ["a", "b"]}, "num_classes is 5"),
    ({"pretrained_cfg__std": [1, 0, 1]}, "above 0"),
    ({"pretrained_cfg__mean": [1, float("nan"), 1]}, "NaN is not a number"),
    ({"size": [32]}, "height, width"),
    ({"size": [32, 2**20]}, "too large"),
    ({"head_width": 2.5}, "head_width is 2.5"),
    ({"head_width": 13}, "but config.json asks for"),
]


@pytest.mark.parametrize(("changes", "told"), REFUSED, ids=[next(iter(c)) for c, _ in REFUSED])
def test_a_configuration_that_says_something_wrong_is_refused(
    saved, tmp_path, unchecked, changes, told
):
    with pytest.raises(AccelError, match=told):
        VisionPipeline.from_pretrained(_changed(saved, tmp_path, **changes))


def test_weights_that_are_no_safetensors_are_refused(saved, tmp_path):
    folder = _changed(saved, tmp_path)
    torch.save({}, folder / "model.safetensors")
    with pytest.raises(AccelError, match="no weights can be read"):
        VisionPipeline.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(AccelError, match="no weights can be read"):
        VisionPipeline.from_pretrained(folder)
    with pytest.raises(AccelError, match="no vision model can be read"):
        VisionPipeline.from_pretrained(folder / "nowhere")
    with pytest.raises(AccelError, match="safetensors only"):
        tiny_vision.vit().save_pretrained(folder, safe_serialization=False)


def test_a_pipeline_has_a_model_for_its_task():
    config = VisionConfig(tiny_vision.VIT, ("a", "b"), "segmentation")
    with pytest.raises(AccelError, match="no model for the task 'segmentation'"):
        VisionPipeline(tiny_vision.vit().model, config)
