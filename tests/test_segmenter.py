"""Stage 5: the segmenters' layers and loss, their crops, and what becomes of any photographs."""

import importlib
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import noise_image, run_program, write_image, write_mask
from PIL import ExifTags, Image
from torch import nn

from network import tiny_seg
from tool import transforms
from tool.maps import load_index_png, load_maps
from tool.segmentation import multi_scale_scores
from train_seg import batch_loss
from voc12.datasets import SegmenterTrainingSet
from voc12.devkit import Devkit

CPU = torch.device("cpu")
NETWORKS = ["tiny_seg", *(pytest.param(f"{name}_seg", marks=pytest.mark.slow)
                          for name in ("vgg16", "resnet38", "resnet50"))]  # fmt: skip


def build(name) -> nn.Module:
    torch.manual_seed(0)
    return importlib.import_module(f"network.{name}").Net(num_classes=6)


# Layers and loss


def deeplab_large_fov(net, x):
    """DeepLab-LargeFOV written out, with the weights of a network."""

    def conv(name, x, dilation=1):
        layer = net.get_submodule(name)
        padding = dilation * (layer.weight.shape[-1] // 2)
        return F.conv2d(x, layer.weight, layer.bias, padding=padding, dilation=dilation)

    for stage, (layers, stride) in enumerate(zip((2, 2, 3, 3), (2, 2, 2, 1), strict=True), 1):
        for layer in range(layers):
            x = conv(f"conv{stage}_{layer + 1}", x).relu()
        x = nn.MaxPool2d(3, stride, padding=1)(x)
    for layer in range(3):
        x = conv(f"conv5_{layer + 1}", x, dilation=2).relu()
    x = nn.AvgPool2d(3, 1, padding=1)(nn.MaxPool2d(3, 1, padding=1)(x))
    return conv("fc8", conv("fc7", conv("fc6", x, dilation=12).relu()).relu())


def wide_head(net, x):
    """SEAM's segmenter on the last level of a backbone, written out with a network's weights."""
    layers = nn.Sequential(
        nn.Conv2d(net.level_channels[-1], 512, 3, padding=12, dilation=12, bias=False),
        nn.BatchNorm2d(512, momentum=3e-4),
        nn.ReLU(),
        nn.Conv2d(512, 512, 1, bias=False),
        nn.BatchNorm2d(512, momentum=3e-4),
        nn.ReLU(),
        nn.Conv2d(512, 7, 1),
    ).eval()
    names = ("fov", "fov_norm", None, "mix", "mix_norm", None, "fc8")
    for layer, name in zip(layers, names, strict=True):
        if name:
            layer.load_state_dict(net.get_submodule(name).state_dict())
    return layers(net.forward_levels(x)[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "written_out"),
    [("vgg16_seg", deeplab_large_fov), ("resnet38_seg", wide_head), ("resnet50_seg", wide_head)],
)
@torch.no_grad()
def test_forward_pass_equals_the_layers_written_out(name, written_out):
    net = build(name).eval()
    x = torch.randn(1, 3, 73, 89)
    logits = net(x)
    assert logits.shape == (1, 7, 10, 12)
    torch.testing.assert_close(logits, written_out(net, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_loss_and_gradients_equal_plain_pytorch(name):
    net = build(name).eval()  # no dropout
    x, labels = torch.randn(2, 3, 57, 57), torch.randint(0, 7, (2, 57, 57), dtype=torch.uint8)
    labels[:, :9] = 255
    loss = batch_loss(net, net, x, labels, CPU, None)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained)

    logits, target = net(x), labels.long()
    if name in ("tiny_seg", "vgg16_seg"):
        target = F.interpolate(labels[:, None].float(), logits.shape[-2:])[:, 0].long()
    else:
        logits = nn.Upsample((57, 57), mode="bilinear", align_corners=True)(logits)
    kept = target != 255
    expected = -logits.log_softmax(1).gather(1, target.clamp(max=6)[:, None])[:, 0][kept].mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, trained), strict=True):
        assert (gradient - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.slow
def test_batch_norm_of_the_head_trains_and_that_of_the_backbone_does_not():
    net = build("resnet50_seg").train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD([p for group in net.get_parameter_groups() for p in group], 0.01)
    net(torch.randn(2, 3, 65, 65)).sum().backward()
    optimizer.step()
    changed = {name for name, value in net.state_dict().items() if not value.equal(before[name])}
    norms = {name.rpartition(".")[0] for name in before if name.endswith("running_mean")}
    assert norms & {name.rpartition(".")[0] for name in changed} == {"fov_norm", "mix_norm"}
    fast = {id(p) for group in net.get_parameter_groups()[2:] for p in group}
    names = {name for name, parameter in net.named_parameters() if id(parameter) in fast}
    assert names == {"fov.weight", "mix.weight", "fc8.weight", "fc8.bias"}


@torch.no_grad()
def test_scores_are_the_softmax_of_the_mean_logits_over_scales_and_mirrors():
    net = build("tiny_seg").eval()
    scaled = [torch.randn(3, 40, 56), torch.randn(3, 20, 28)]
    logits = []
    for image in scaled:
        for flipped in (False, True):
            x = image.flip(-1) if flipped else image
            y = F.interpolate(net(x[None]), (40, 56), mode="bilinear", align_corners=True)
            logits.append(y.flip(-1) if flipped else y)
    expected = torch.stack(logits).mean(0).softmax(1)[0]
    torch.testing.assert_close(multi_scale_scores(net, scaled, (40, 56)), expected)


# Crops


def test_crops_keep_pixels_and_labels_together(tmp_path):
    label = np.kron(np.arange(12).reshape(3, 4), np.ones((16, 20))).astype(np.uint8)
    gray = Image.fromarray(np.repeat(20 * label[..., None], 3, axis=2))
    write_image(tmp_path, "a", gray)
    write_mask(tmp_path, "a", label, "labels")
    data = SegmenterTrainingSet(
        Devkit(tmp_path), ["a"], lambda x: x.astype(np.float32), tmp_path / "labels",
        crop_size=64, scales=(0.5, 2), hsv_shift=0, seed=0,
    )  # fmt: skip
    seen = set()
    for epoch in range(12):
        image, target = data[epoch, 0]
        assert image.shape == (3, 64, 64)
        assert (target.shape, target.dtype) == ((64, 64), torch.uint8)
        outside = target == 255
        assert (image[:, outside] == 0).all()
        # Bicubic and nearest resizing differ at the borders of the rectangles.
        equal = (image[0] / 20).round() == target
        assert equal[~outside].float().mean() > 0.8
        seen.add(outside.any().item())
    assert seen == {False, True}


def test_hsv_is_shifted_by_at_most_the_limit(rng):
    image = noise_image(30, 40)
    before, shifts = np.asarray(image.convert("HSV")).astype(int), set()
    for _ in range(30):
        after = np.asarray(transforms.shift_hsv(image, 10, rng).convert("HSV")).astype(int)
        inner = (before[..., 1:] > 60).all(-1) & (before[..., 1:] < 200).all(-1)
        change = np.median((after - before)[inner], axis=0)
        assert (np.abs((change + 128) % 256 - 128) <= 11).all()
        shifts.add(tuple(change))
    assert len(shifts) > 20
    assert transforms.shift_hsv(image, 0, rng) == image.convert("HSV").convert("RGB")


# Photographs


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    net = tiny_seg.Net()
    nn.init.normal_(net.fc8.weight)
    torch.save(net.state_dict(), tmp_path / "seg.pth")
    for name in ("photos/one.png", "photos/two.JPG", "more/three.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise_image(50, 70, seed=len(name)).save(tmp_path / name)
    (tmp_path / "photos" / "._one.png").write_bytes(b"macOS")
    (tmp_path / "photos" / "notes.txt").write_text("no photograph")
    return tmp_path


SEGMENT = (
    "infer_seg --network network.tiny_seg --weights seg.pth --num_workers 0 --scales 1 "
    "--out_seg seg "
)


def test_any_photographs_are_segmented_and_drawn_over(folder):
    flags = "--images photos more/three.webp --out_overlay overlay --out_scores scores --crf"
    run_program(SEGMENT + flags, folder).check()
    for name in ("one", "two", "three"):
        label = load_index_png(folder / "seg" / f"{name}.png")
        assert label.shape == (50, 70)
        scores = load_maps(folder / "scores" / f"{name}.npz")
        assert np.array_equal(np.stack([*scores.values()]).argmax(0)[label > 0], label[label > 0])
        with Image.open(folder / "overlay" / f"{name}.png") as overlay:
            present = len(set(np.unique(label)) - {0})
            assert overlay.size == (70, 50 + 20 * present)
            assert present > 1
    assert len(list((folder / "seg").glob("[!.]*"))) == 3


def test_photographs_are_turned_upright(folder):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise_image(50, 70).save(folder / "photos" / "turned.jpg", exif=exif)
    run_program(f"{SEGMENT} --images photos/turned.jpg", folder).check()
    assert load_index_png(folder / "seg" / "turned.png").shape == (70, 50)


def test_other_photographs_of_the_same_names_are_no_repetition(folder):
    run_program(f"{SEGMENT} --images photos", folder).check()
    (folder / "photos").rename(folder / "moved")
    again = run_program(f"{SEGMENT} --images moved", folder)
    again.assert_failed(2, "--out_seg seg", "--images")


def test_submission_has_the_labels_of_the_list_where_the_server_looks(folder):
    for name in ("x", "y"):
        write_image(folder / "VOC", name, noise_image(40, 50))
    (folder / "test.txt").write_text("x\ny\n")
    flags = "--voc12_root VOC --infer_list test.txt --voc_submission out/results.tar"
    run_program(SEGMENT + flags, folder).check()
    with tarfile.open(folder / "out" / "results.tar") as archive:
        names = [f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png" for name in "xy"]
        assert archive.getnames() == names
        content = archive.extractfile(names[1]).read()
    assert content == (folder / "seg" / "y.png").read_bytes()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("", 2, ("--voc12_root", "--images")),
        ("--images photos --voc12_root VOC", 2, ("--images",)),
        ("--images absent.jpg", 1, ("absent.jpg: no such file",)),
        ("--images empty", 1, ("empty: has no photographs", ".jpg")),
        ("--images photos photos/one.png more", 1, ("more/one.jpg", "photos/one.png", "rename")),
        ("--images photos --out_seg photos", 2, ("--out_seg photos", "another folder")),
        ("--images photos --out_overlay seg", 2, ("--out_overlay seg", "another")),
        ("--images photos --voc_submission a.zip", 2, ("--voc_submission a.zip", ".tar")),
        ("--images photos --network network.tiny_cls", 2, ("is not a segmenter",)),
        ("--images photos --classes two.txt", 1, ("fc8.weight", "--classes")),
    ],
)
def test_wrong_input_is_one_sentence(flags, code, words, folder):
    (folder / "empty").mkdir()
    (folder / "two.txt").write_text("cat\ndog\n")
    noise_image(9, 9).save(folder / "more" / "one.jpg")
    run_program(SEGMENT + flags, folder).assert_failed(code, *words)
