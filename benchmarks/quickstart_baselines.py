"""What the quickstart's backbone is worth: the same digits, classified from raw pixels.

    python benchmarks/quickstart_baselines.py

Nearest class mean and ridge regression on the pixels, all ten classes at once, on the split that
the pipeline uses. Compare with A_last of `graftwork run quickstart`.
"""

import io

import numpy as np
from PIL import Image

from graftwork.operators.data import digits


def pixels(split: str) -> np.ndarray:
    """[N, 64] grey values in 0..1."""
    images = [Image.open(io.BytesIO(data)).convert("L") for data in digits.images(split)]
    return np.stack([np.asarray(image, dtype=np.float64).reshape(-1) for image in images]) / 255


def main() -> None:
    x, y = pixels("train"), np.asarray(digits.labels("train"))
    u, v = pixels("test"), np.asarray(digits.labels("test"))
    means = np.stack([x[y == c].mean(0) for c in range(10)])
    distances = ((u[:, None] - means[None]) ** 2).sum(2)
    print(f"nearest class mean on pixels  {100 * (distances.argmin(1) == v).mean():.2f} %")
    centred = x - x.mean(0)
    gram = centred.T @ centred + np.eye(64)
    solution = np.linalg.solve(gram, centred.T @ np.eye(10)[y])
    predicted = ((u - x.mean(0)) @ solution + np.eye(10)[y].mean(0)).argmax(1)
    print(f"ridge regression on pixels    {100 * (predicted == v).mean():.2f} %")


main()
