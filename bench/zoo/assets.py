"""Makes the shipped images of the micro zoo (digits, photographs) from the packages they came in.

Needs scikit-learn and a folder with scikit-image's bundled images; run once by a developer.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

SHORT_SIDE = 128
SKIMAGE_FILES = {
    "astronaut": "astronaut.png",
    "bricks": "brick.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "rocket": "rocket.jpg",
}
SKLEARN_FILES = {"temple": "china.jpg", "flower": "flower.jpg"}


def make_assets(skimage_folder: Path, target: Path) -> None:
    """Write `digits.safetensors` and `photos/*.png`.

    Args:
        skimage_folder: Folder of scikit-image's data.
        target: Folder to write to.
    """
    import sklearn.datasets

    flat, values = sklearn.datasets.load_digits(return_X_y=True)
    images = np.asarray(flat).reshape(-1, 8, 8)
    arrays = {"images": images.astype(np.uint8), "values": np.asarray(values).astype(np.uint8)}
    save_file(arrays, target / "digits.safetensors")
    (target / "photos").mkdir(exist_ok=True)
    folder = Path(sklearn.datasets.__file__).parent / "images"
    sources = {label: skimage_folder / name for label, name in SKIMAGE_FILES.items()}
    sources |= {label: folder / name for label, name in SKLEARN_FILES.items()}
    for label, path in sources.items():
        with Image.open(path) as image:
            image_rgb = image.convert("RGB")
        scale = SHORT_SIDE / min(image_rgb.size)
        size = (round(image_rgb.width * scale), round(image_rgb.height * scale))
        small = image_rgb.resize(size, Image.Resampling.LANCZOS)
        small.save(target / "photos" / f"{label}.png", optimize=True)
