"""`hf-vit search QUERY --model M --in FILE`: the images whose features are most similar to those of a query image.

Not FAISS: building an index pays off only for many queries, and a call has one.

Tests: tests/hf_vit/cli/test_cli.py.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from ..atomic_file import atomic_path
from ..download import download, is_address
from ..errors import HFViTError
from ..image_io import UnreadableImage, open_image
from .embed import embed, fingerprint, read_features
from .inputs import find_images, open_model, positive, print_table


EXAMPLES = """\
  hf-vit embed images/ --model owner/name --out features.parquet
  hf-vit search cat.jpg --model owner/name --in features.parquet --top-k 12 --sheet sheet.png"""
CELL, CAPTION, COLUMNS = 160, 18, 6  # contact sheet: pixels of an image, of its caption; images per row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, all but `--json`."""
    parser.add_argument("query", help="an image file, or its address")
    parser.add_argument("--model", required=True, help="the model that the features were computed with")
    parser.add_argument("--in", required=True, dest="features_file", metavar="FILE", help="output of hf-vit embed")
    parser.add_argument("--top-k", type=positive, default=10, metavar="K", help="images to find (default 10)")
    parser.add_argument("--sheet", metavar="PNG", help="write a contact sheet of the query and the matches")
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PX", help="one number, or height and width")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Print the most similar images, and draw a contact sheet."""
    if arguments.sheet is not None and Path(arguments.sheet).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise HFViTError(f"--sheet {arguments.sheet}: write to a .png, .jpg or .webp file")
    names, features, about = read_features(Path(arguments.features_file))
    query = find_images([arguments.query], addresses=True)
    if len(query) != 1:
        raise HFViTError(f"the query is one image, '{arguments.query}' means {len(query)}")
    model, processor = open_model(arguments.model, arguments, 1, classes=False)
    weights = fingerprint(model, processor)
    _, query_features, unreadable = embed(model, processor, query, about["features"], 1)
    if unreadable:
        raise HFViTError(f"{unreadable[0]['image']}: {unreadable[0]['reason']}")
    if query_features.shape[1] != features.shape[1]:
        raise HFViTError(
            f"{arguments.features_file} holds {features.shape[1]} numbers an image, computed with {about['model']}; "
            f"{arguments.model} gives {query_features.shape[1]}: search with the model that the features are of"
        )
    # files of earlier versions have only the model's name
    same = weights == about["weights"] if "weights" in about else str(arguments.model) == about["model"]
    if not same:
        print(
            f"note: the features were computed with other weights or another image size, of --model {about['model']}: "
            "similarities mean little",
            file=sys.stderr,
        )
    order, similarity = nearest(query_features[0], features, arguments.top_k)
    matches: list[dict[str, Any]] = [{"image": names[row], "similarity": float(similarity[row])} for row in order]
    if arguments.sheet is not None:
        draw_sheet(Path(arguments.sheet), query[0], matches)
    if arguments.json:
        print(json.dumps({"query": arguments.query, "found": matches}, indent=2, ensure_ascii=False))
    else:
        print_table([(row["image"], f"{row['similarity']:.4f}") for row in matches])
    return 0


def nearest(query: np.ndarray, features: np.ndarray, count: int) -> tuple[list[int], np.ndarray]:
    """Rows of `features` (N, D) by decreasing cosine similarity to `query` (D,), and all similarities (N,)."""
    norms = np.linalg.norm(features, axis=1) * np.linalg.norm(query)
    similarity = features @ query / np.maximum(norms, np.finfo(np.float32).tiny)
    return np.argsort(-similarity, kind="stable")[:count].tolist(), similarity


def draw_sheet(path: Path, query: Path | str, matches: list[dict]) -> None:
    """Draw the query and the matches with their similarity, six images a row."""
    cells = [(str(query), "query"), *((row["image"], f"{row['similarity']:.3f}") for row in matches)]
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (min(len(cells), COLUMNS) * CELL, rows * (CELL + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, caption) in enumerate(cells):
        left, top = number % COLUMNS * CELL, number // COLUMNS * (CELL + CAPTION)
        try:
            image = open_image(download(name) if is_address(name) else name)
            image = ImageOps.contain(
                image, (CELL - 4, CELL - 4)
            )  # not thumbnail(), which does not enlarge small images
            sheet.paste(image, (left + (CELL - image.width) // 2, top + (CELL - image.height) // 2))
        except (UnreadableImage, OSError):  # moved or removed since its features were computed
            draw.text((left + 4, top + CELL // 2), "not found any more", fill="gray")
        draw.text((left + 4, top + CELL + 2), caption, fill="black")
    with atomic_path(path) as temporary:
        sheet.save(temporary)
