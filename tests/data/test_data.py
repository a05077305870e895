"""Datasets and the loader: real pixels against NumPy, the crop against exact cases, one stream of
samples whatever the split into ranks, micro-batches and workers."""

import gc
import json
import signal
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from mixflow_fast.data import (
    BatchLoader,
    Digits,
    ImageFolder,
    Latents,
    Photos,
    adm_center_crop,
    build_dataset,
    sample_index,
)
from mixflow_fast.kernels.philox import Stream, normal, uniform

sklearn_datasets = pytest.importorskip("sklearn.datasets")


def every(dataset):
    return torch.arange(len(dataset))


def get(dataset, *indices, seed=0, first=0):
    indices = torch.tensor(indices, dtype=torch.int64)
    return dataset.get(indices, torch.arange(first, first + len(indices)), seed)


def halved_photos():
    """float64 box averages of the photographs, (photo, row, column, channel)."""
    images = [sklearn_datasets.load_sample_image(n) for n in ("china.jpg", "flower.jpg")]
    pixels = np.stack(images).astype(np.float64)[:, :426]
    return pixels.reshape(2, 213, 2, 320, 2, 3).mean(axis=(2, 4)) / 127.5 - 1


# Embedded sets


@pytest.mark.parametrize("split", ["train", "heldout", "all"])
def test_photo_windows_are_slices_of_the_halved_photographs(split):
    dataset, truth = Photos(split), halved_photos()
    indices = torch.cat([every(dataset)[:: len(dataset) // 50], torch.tensor([len(dataset) - 1])])
    batch = dataset.get(indices, torch.zeros_like(indices), 0)
    assert batch.x.shape == (len(indices), 3, 16, 16) and batch.x.dtype == torch.float32
    for x, y, photo, row, col in zip(batch.x, batch.y, *dataset.locate(indices), strict=True):
        window = truth[photo, row : row + 16, col : col + 16].transpose(2, 0, 1)
        assert y == photo
        np.testing.assert_allclose(x.double().numpy(), window, rtol=0, atol=1e-6)


def test_photo_splits_share_no_pixel_and_cover_their_bands():
    covered = {}
    for split in ("train", "heldout"):
        dataset = Photos(split)
        places = torch.stack(dataset.locate(every(dataset)), dim=1)
        assert len(places.unique(dim=0)) == len(dataset)  # no window twice
        mask = np.zeros((2, 213, 320), bool)
        for photo, row, col in places.tolist():
            mask[photo, row : row + 16, col : col + 16] = True
        covered[split] = mask
        # A window inside one band starts in the band that it ends in.
        start, end = places[:, 2], places[:, 2] + 15
        assert torch.equal(start // 53, end // 53)
        assert torch.equal(start % 53 >= 33, end % 53 >= 33)
    assert not (covered["train"] & covered["heldout"]).any()
    assert covered["train"].sum() == 2 * 213 * 6 * 33
    assert covered["heldout"].sum() == 2 * 213 * 6 * 20
    assert len(Photos("train")) == 2 * 198 * 6 * 18 and len(Photos("heldout")) == 2 * 198 * 6 * 5
    assert len(Photos("all")) == 2 * 198 * 305


def test_digits_are_the_images_and_the_splits_partition_them():
    raw = sklearn_datasets.load_digits()
    train, heldout, full = (Digits(8, split) for split in ("train", "heldout", "all"))
    assert (len(train), len(heldout), len(full)) == (1438, 359, 1797)
    x = full.get(every(full), every(full), 0)
    np.testing.assert_array_equal(x.x[:, 0].numpy(), raw.images / 8 - 1)
    np.testing.assert_array_equal(x.y.numpy(), raw.target)
    assert float(x.x.min()) == -1 and float(x.x.max()) == 1
    np.testing.assert_array_equal(get(heldout, 0, 1).x[:, 0], raw.images[[4, 9]] / 8 - 1)
    np.testing.assert_array_equal(get(train, 3, 4).x[:, 0], raw.images[[3, 5]] / 8 - 1)
    for size in (16, 32):
        big = get(Digits(size, "all"), 7).x
        block = np.kron(raw.images[7] / 8 - 1, np.ones((size // 8, size // 8)))
        np.testing.assert_array_equal(big[0, 0].numpy(), block)


# Images on disk


def test_crop_of_four_times_the_size_is_two_exact_halvings():
    # Multiples of 16: every average of 2, 4, 8 and 16 pixels is a whole number, nothing is rounded.
    pixels = np.random.RandomState(0).randint(0, 16, (32, 32, 3)) * 16
    expected = pixels.reshape(8, 4, 8, 4, 3).astype(np.float64).mean(axis=(1, 3))
    cropped = np.asarray(adm_center_crop(Image.fromarray(pixels.astype(np.uint8)), 8))
    np.testing.assert_array_equal(cropped, expected)


@pytest.mark.parametrize(("width", "height"), [(16, 21), (21, 16), (16, 16), (29, 16)])
def test_crop_takes_the_centre_rounded_down(width, height):
    pixels = np.random.RandomState(1).randint(0, 256, (height, width, 3)).astype(np.uint8)
    top, left = (height - 16) // 2, (width - 16) // 2
    cropped = np.asarray(adm_center_crop(Image.fromarray(pixels), 16))
    np.testing.assert_array_equal(cropped, pixels[top : top + 16, left : left + 16])


@pytest.mark.parametrize(("width", "height"), [(25, 37), (31, 17), (90, 67), (65, 300)])
def test_crop_matches_torch_on_odd_sizes(width, height):
    """PyTorch's antialiased bicubic (float64) is the truth; PIL rounds to bytes twice a resize."""
    row, col = np.mgrid[0:height, 0:width]
    smooth = 128 + 60 * np.sin(row / 9.0) + 40 * np.cos(col / 7.0)
    image = Image.fromarray(np.stack([smooth, smooth, smooth], -1).astype(np.uint8))
    cropped = np.asarray(adm_center_crop(image, 16)).astype(np.float64)
    assert cropped.shape == (16, 16, 3)
    if min(width, height) >= 32:  # the halvings are checked exactly above
        while min(image.size) >= 32:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = 16 / min(image.size)
    new_height, new_width = round(image.height * scale), round(image.width * scale)
    truth = torch.nn.functional.interpolate(
        torch.from_numpy(np.asarray(image).astype(np.float64)).permute(2, 0, 1)[None],
        size=(new_height, new_width),
        mode="bicubic",
        antialias=True,
    )[0].permute(1, 2, 0)
    top, left = (new_height - 16) // 2, (new_width - 16) // 2
    difference = cropped - truth[top : top + 16, left : left + 16].numpy()
    assert np.abs(difference).max() <= 1.2  # 0.5 * (sum of |weights| <= 1.3) + 0.5


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of real windows (lossless), 6 images, one of them in a sub-folder."""
    photos = halved_photos()
    for label, name in enumerate(("b_china", "a_flower")):
        (tmp_path / name / "sub").mkdir(parents=True)
        for number in range(3):
            window = photos[label, 20 * number : 20 * number + 18, 30:51]
            file = tmp_path / name / ("sub" if number == 2 else "") / f"{number}.png"
            Image.fromarray(np.rint((window + 1) * 127.5).astype(np.uint8)).save(file)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "a_flower" / "notes.txt").write_text("no image")
    return tmp_path


def test_folder_reads_classes_in_order_and_pixels_exactly(image_folder):
    dataset = ImageFolder(image_folder, 18, flip=False)
    assert dataset.classes == ["a_flower", "b_china"] and dataset.num_classes == 2
    assert len(dataset) == 6 and dataset.shape == (3, 18, 18)
    batch = get(dataset, *range(6))
    assert batch.y.tolist() == [0, 0, 0, 1, 1, 1]
    file = image_folder / "b_china" / "sub" / "2.png"
    pixels = np.asarray(Image.open(file))[:, 1:19].astype(np.float64)
    np.testing.assert_allclose(batch.x[5].numpy(), pixels.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_flips_follow_the_position_alone(image_folder):
    plain, flipped = ImageFolder(image_folder, 16, flip=False), ImageFolder(image_folder, 16)
    indices, positions = torch.tensor([0, 1, 2, 3, 4, 5] * 8), torch.arange(100, 148)
    mirrored = uniform(5, Stream.FLIP, positions)[:, 0] < 0.5
    assert 8 < int(mirrored.sum()) < 40  # 24 +- 4.6 standard deviations
    x, y = plain.get(indices, positions, 5).x, flipped.get(indices, positions, 5).x
    assert torch.equal(y[~mirrored], x[~mirrored]) and torch.equal(y[mirrored], x[mirrored].flip(3))
    alone = flipped.get(indices[7:9], positions[7:9], 5).x
    assert torch.equal(alone, y[7:9])
    assert not torch.equal(flipped.get(indices, positions, 6).x, y)


def test_grey_and_transparent_images_become_rgb(tmp_path):
    (tmp_path / "c").mkdir()
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "c" / "0.png")
    alpha = np.dstack([grey, grey + 1, grey + 2, grey])
    Image.fromarray(alpha).save(tmp_path / "c" / "1.png")
    x = (get(ImageFolder(tmp_path, 8, flip=False), 0, 1).x + 1) * 127.5
    for channel in range(3):
        np.testing.assert_allclose(x[0, channel], grey, atol=1e-4)
        np.testing.assert_allclose(x[1, channel], grey + channel, atol=1e-4)


def test_bad_folders_and_images_are_named(image_folder, tmp_path_factory):
    with pytest.raises(ValueError, match="path must be a folder.*nowhere"):
        ImageFolder(image_folder / "nowhere", 16)
    with pytest.raises(ValueError, match="no class folder"):
        ImageFolder(tmp_path_factory.mktemp("empty"), 16)
    with pytest.raises(ValueError, match="size must be"):
        ImageFolder(image_folder, 0)
    good = (image_folder / "a_flower" / "0.png").read_bytes()
    for content in (b"not an image", good[: len(good) // 2]):
        (image_folder / "a_flower" / "0.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read the image .*a_flower.0\.png"):
            get(ImageFolder(image_folder, 16), 0)
    (image_folder / "c_empty").mkdir()
    with pytest.raises(ValueError, match="c_empty.*no image"):
        ImageFolder(image_folder, 16)


# Latents

LATENTS = np.random.RandomState(3).standard_normal((6, 4, 2, 3)).astype(np.float32)
MOMENTS = np.abs(LATENTS) + np.float32(0.1)
LABELS = np.array([0, 2, 1, 2, 0, 4])
FEATURES = np.random.RandomState(4).standard_normal((6, 5, 7)).astype(np.float16)


def write_npz(folder, x, labels=LABELS, **more):
    np.savez(folder / "set.npz", latents=x, labels=labels, **more)
    return folder / "set.npz"


def write_npy(folder, x, labels=LABELS):
    np.save(folder / "set.npy", x)
    np.save(folder / "set_labels.npy", labels)
    return folder / "set.npy"


def write_folder(folder, x, labels=LABELS):
    np.save(folder / "x.npy", x)
    np.save(folder / "labels.npy", labels)
    return folder


def write_repa(folder, x, labels=LABELS):
    names = [f"{i // 3:05d}/img-{i:08d}.npy" for i in range(len(x))]
    for name, sample in zip(names, x, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        np.save(folder / name, sample)
    pairs = list(zip(names, np.asarray(labels).tolist(), strict=True))[
        ::-1
    ]  # order must not matter
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return folder


WRITERS = [write_npz, write_npy, write_folder, write_repa]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_latents_come_back_exactly_in_float32(tmp_path, write, dtype):
    dataset = Latents(write(tmp_path, LATENTS.astype(dtype)), scale=0.5)
    assert (len(dataset), dataset.shape, dataset.num_classes) == (6, (4, 2, 3), 5)
    batch = get(dataset, 5, 0, 3)
    assert batch.x.dtype == torch.float32 and batch.features is None
    expected = LATENTS.astype(dtype).astype(np.float32)[[5, 0, 3]] * np.float32(0.5)
    np.testing.assert_array_equal(batch.x.numpy(), expected)
    assert batch.y.tolist() == [4, 0, 2]


@pytest.mark.parametrize("write", WRITERS)
def test_moments_draw_the_posterior_by_position(tmp_path, write):
    dataset = Latents(write(tmp_path, MOMENTS), scale=0.18215, moments=True)
    assert dataset.shape == (2, 2, 3)
    mean, std = np.split(MOMENTS.astype(np.float64)[[4, 1]], 2, axis=1)
    noise = normal(11, Stream.POSTERIOR, torch.tensor([50, 51]), 12).view(2, 2, 2, 3)
    expected = (mean + std * noise.double().numpy()) * 0.18215
    batch = get(dataset, 4, 1, seed=11, first=50)
    np.testing.assert_allclose(batch.x.numpy(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(get(dataset, 1, seed=11, first=51).x, batch.x[1:])
    assert not torch.equal(get(dataset, 1, seed=11, first=52).x, batch.x[1:])


def test_posterior_samples_have_the_stored_mean_and_std(tmp_path):
    dataset = Latents(write_npz(tmp_path, MOMENTS), moments=True)
    count = 4000
    indices = torch.full((count,), 2)
    x = dataset.get(indices, torch.arange(count), 0).x.double()
    mean, std = (torch.from_numpy(part).double() for part in np.split(MOMENTS[2], 2))
    assert ((x.mean(0) - mean).abs() < 5 * std / count**0.5).all()
    assert ((x.std(0) - std).abs() < 5 * std / (2 * count) ** 0.5).all()


def test_features_travel_with_their_latents(tmp_path):
    path = write_npz(tmp_path, LATENTS, features=FEATURES)
    batch = get(Latents(path), 3, 1)
    assert batch.features.dtype == torch.float32
    np.testing.assert_array_equal(batch.features.numpy(), FEATURES[[3, 1]].astype(np.float32))
    assert get(Latents(path, features=False), 3).features is None
    write_npy(tmp_path, LATENTS)
    assert get(Latents(tmp_path / "set.npy"), 3).features is None
    np.save(tmp_path / "other.npy", FEATURES[::-1])
    batch = get(Latents(tmp_path / "set.npy", features=tmp_path / "other.npy"), 5)
    np.testing.assert_array_equal(batch.features.numpy(), FEATURES[:1].astype(np.float32))
    np.save(tmp_path / "features.npy", FEATURES)
    batch = get(Latents(tmp_path / "set.npy"), 3)
    np.testing.assert_array_equal(batch.features.numpy(), FEATURES[3:4].astype(np.float32))
    np.save(tmp_path / "features.npy", FEATURES[:5])
    with pytest.raises(ValueError, match="features must have one row per latent, 6, got 5"):
        Latents(tmp_path / "set.npy")


def test_npy_is_memory_mapped_and_never_written(tmp_path):
    path = write_npy(tmp_path, LATENTS)
    dataset = Latents(path)
    assert isinstance(dataset._x, np.memmap)
    get(dataset, 0).x.fill_(9.0)
    np.testing.assert_array_equal(np.load(path), LATENTS)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("x", "labels", "kwargs", "message"),
    [
        (LATENTS[:, 0], LABELS, {}, r"latents of .* must be \(N, C, H, W\)"),
        (LATENTS.astype(np.float64), LABELS, {}, "must be float16 or float32, got float64"),
        (LATENTS[:, :3], LABELS, {"moments": True}, "even number of channels"),
        (LATENTS, LABELS - 1, {}, "labels must lie in"),
        (LATENTS, LABELS, {"num_classes": 4}, r"labels must lie in \[0, 4\), got 0 to 4"),
        (LATENTS, LABELS.astype(np.float32), {}, "labels must be .* integers"),
        (LATENTS, LABELS, {"scale": 0.0}, "scale must be"),
        (LATENTS, LABELS, {"features": "no/such.npy"}, "such.npy"),
    ],
)
def test_bad_latents_are_refused(tmp_path, write, x, labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        Latents(write(tmp_path, x, labels), **kwargs)


@pytest.mark.parametrize("write", [write_npz, write_npy, write_folder])
def test_counts_must_agree(tmp_path, write):
    with pytest.raises(ValueError, match="labels must have one entry per latent, 6, got 5"):
        Latents(write(tmp_path, LATENTS, LABELS[:5]))


@pytest.mark.parametrize("write", [write_npz, write_npy, write_folder, write_repa])
def test_pickled_arrays_are_refused(tmp_path, write):
    with pytest.raises(ValueError, match="cannot read the arrays of"):
        Latents(write(tmp_path, LATENTS.astype(object)))


def test_log_variances_and_unlabelled_or_unknown_paths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="log-variance"):
        get(Latents(write_npz(tmp_path, LATENTS), moments=True), *range(6))
    np.savez(tmp_path / "m.npz", moments=MOMENTS, y=LABELS)
    with pytest.raises(ValueError, match="pass moments=True"):
        Latents(tmp_path / "m.npz")
    assert len(Latents(tmp_path / "m.npz", moments=True)) == 6
    np.save(tmp_path / "alone.npy", LATENTS)
    with pytest.raises(ValueError, match="alone_labels.npy or labels.npy"):
        Latents(tmp_path / "alone.npy")
    with pytest.raises(ValueError, match="path must be a .npz, a .npy or a folder"):
        Latents(tmp_path / "none.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 but no archive")
    with pytest.raises(ValueError, match="cannot read the arrays of .*broken.npz"):
        Latents(tmp_path / "broken.npz")


# build_source and indices


def test_build_source(image_folder, tmp_path):
    assert isinstance(build_dataset("photos", split="heldout"), Photos)
    assert isinstance(build_dataset("digits", size=16), Digits)
    assert isinstance(build_dataset("folder", path=image_folder, size=16), ImageFolder)
    assert isinstance(build_dataset("latents", path=write_npz(tmp_path, LATENTS)), Latents)
    with pytest.raises(ValueError, match="data kind must be one of .* got 'photo'; did you mean 'photos'"):
        build_dataset("photo")
    with pytest.raises(ValueError, match="unknown argument 'splt'.*did you mean 'split'"):
        build_dataset("photos", splt="train")
    with pytest.raises(ValueError, match="'folder' needs the argument 'path'"):
        build_dataset("folder", size=16)
    with pytest.raises(ValueError, match="split must be one of train, heldout, all"):
        build_dataset("photos", split="test")
    with pytest.raises(ValueError, match=r"size must be in \[1, 20\]"):
        build_dataset("photos", split="heldout", size=21)


@pytest.mark.parametrize("bad", [-1, 1797])
def test_indices_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 1797\)"):
        get(Digits(8, "all"), 0, bad)


# The loader


def collect(loader, steps):
    """{position: (y, bytes of x)} of the next optimizer steps, and the order of positions."""
    samples, order = {}, []
    for _ in range(steps * loader.microsteps):
        batch = next(loader)
        for position, x, y in zip(batch.positions.tolist(), batch.x, batch.y, strict=True):
            assert position not in samples
            samples[position] = (int(y), x.numpy().tobytes())
            order.append(position)
    loader.close()
    return samples, order


def moments_source(folder):
    return Latents(write_npz(folder, MOMENTS), moments=True)


SOURCES = {
    "photos": lambda folder: Photos(flip=True),
    "moments": moments_source,
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize(("world_size", "microbatch_size"), [(1, 4), (2, 3), (3, 2), (12, 1)])
def test_every_split_gives_the_same_stream(tmp_path, kind, workers, world_size, microbatch_size):
    dataset = SOURCES[kind](tmp_path)
    common = {"seed": 7, "global_batch_size": 12, "start_position": 36}
    whole, order = collect(BatchLoader(dataset, microbatch_size=12, **common), 3)
    assert order == list(range(36, 72))
    union = {}
    for rank in range(world_size):
        loader = BatchLoader(
            dataset,
            microbatch_size=microbatch_size,
            rank=rank,
            world_size=world_size,
            num_workers=workers,
            **common,
        )
        part, order = collect(loader, 3)
        # The formula, written out as loops.
        assert order == [
            step * 12 + (micro * world_size + rank) * microbatch_size + i
            for step in range(3, 6)
            for micro in range(12 // (world_size * microbatch_size))
            for i in range(microbatch_size)
        ]
        assert not union.keys() & part.keys()
        union |= part
    assert union == whole


def test_batches_hold_the_samples_that_the_order_names():
    dataset = Digits(8, "all")
    loader = BatchLoader(dataset, seed=3, global_batch_size=599, microbatch_size=599)
    batches = [next(loader) for _ in range(4)]  # one epoch is three steps
    positions = torch.cat([batch.positions for batch in batches])
    index = sample_index(positions, 1797, 3)
    x = torch.cat([batch.x for batch in batches])
    raw = torch.from_numpy(sklearn_datasets.load_digits().images).float()
    assert torch.equal(x[:, 0], raw[index] / 8 - 1)
    assert sorted(index[:1797].tolist()) == list(range(1797))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_far_start_equals_skipping(workers):
    dataset = Photos(flip=True)
    common = {"seed": 1, "global_batch_size": 64, "microbatch_size": 32, "num_workers": workers}
    skipping = BatchLoader(dataset, **common)
    for _ in range(2 * 130):  # more than one block of the order
        next(skipping)
    assert skipping.position == 64 * 130
    started = BatchLoader(dataset, start_position=64 * 130, **common)
    assert started.position == 64 * 130
    assert collect(started, 2) == collect(skipping, 2)
    with BatchLoader(dataset, start_position=64 << 50, **common) as far:
        assert next(far).positions[0].item() == 64 << 50


def test_without_shuffle_samples_come_as_stored():
    loader = BatchLoader(
        Digits(8, "all"), seed=0, global_batch_size=8, microbatch_size=8, shuffle=False
    )
    assert next(loader).y.tolist() == sklearn_datasets.load_digits().target[:8].tolist()


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("mixflow_fast-loader")]


class Slow:
    """Digits that take time, count calls, and call `at` on a chosen position."""

    num_classes, shape, name = 10, (1, 8, 8), "slow"

    def __init__(self, delay, position=-1, at=None):
        self.digits, self.delay, self.position, self.at = Digits(), delay, position, at
        self.started = []

    def __len__(self):
        return len(self.digits)

    def get(self, indices, positions, seed):
        first = int(positions[0])
        self.started.append(first)
        time.sleep(self.delay(first))
        if first == self.position:
            self.at()
        return self.digits.get(indices, positions, seed)


def slow_loader(dataset, workers=3):
    return BatchLoader(dataset, seed=0, global_batch_size=4, microbatch_size=4, num_workers=workers)


def test_workers_keep_the_order_and_look_a_bounded_way_ahead():
    dataset = Slow(lambda first: 0.03 if first % 8 == 0 else 0.0)
    with slow_loader(dataset) as loader:
        firsts = [int(next(loader).positions[0]) for _ in range(12)]
        time.sleep(0.2)
        assert firsts == list(range(0, 48, 4))
        assert max(dataset.started) < 4 * (12 + 6)
    assert not loader_threads()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_at_its_batch_with_its_name(image_folder, workers):
    (image_folder / "b_china" / "1.png").write_bytes(b"broken")
    dataset = ImageFolder(image_folder, 16)
    where = sample_index(torch.arange(6), 6, 0).tolist().index(4)
    loader = BatchLoader(
        dataset, seed=0, global_batch_size=1, microbatch_size=1, num_workers=workers
    )
    for _ in range(where):
        next(loader)
    with pytest.raises(ValueError, match=r"b_china.1\.png"):
        next(loader)
    assert not loader_threads()


def test_no_thread_is_left_after_an_interrupt():
    def interrupt():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.1)

    loader = slow_loader(Slow(lambda first: 0.0, position=8, at=interrupt))
    with pytest.raises(KeyboardInterrupt):
        for _ in range(5):
            next(loader)
            time.sleep(0 if loader.position < 8 else 0.05)
    loader.close()
    assert not loader_threads()


def test_no_thread_is_left_after_collection():
    loader = slow_loader(Slow(lambda first: 0.01))
    next(loader)
    assert loader_threads()
    del loader
    gc.collect()
    for thread in loader_threads():
        thread.join(timeout=5)
    assert not loader_threads()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"global_batch_size": 10}, r"global_batch_size must be a multiple of .* 4 \* 2 = 8"),
        (
            {"start_position": 12},
            "start_position must be a multiple of .* = 8, got 12.* starts at 8",
        ),
        ({"start_position": -8}, "start_position must be"),
        ({"rank": 2}, "rank must be below world_size = 2, got 2"),
        ({"microbatch_size": 0}, "microbatch_size must be"),
        ({"num_workers": -1}, "num_workers must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_loader_settings_are_named(kwargs, message):
    good = {"seed": 0, "global_batch_size": 8, "microbatch_size": 4, "world_size": 2}
    with pytest.raises(ValueError, match=message):
        BatchLoader(Digits(), **(good | kwargs))
