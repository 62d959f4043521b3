"""Make the pictures in docs/images and docs/explore.ipynb from an output: plots and the page.

    python docs/make_images.py demo/logits

Needs the extra viz; the pictures of the page need chromium and are left out without it.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from explore_logits import (  # noqa: E402 - run as a script, from anywhere
    analyze_row,
    compute_dataset_stats,
    describe_run,
    get_sample,
    import_extra,
    load_logit_dataset,
    open_text,
    plot_logit_distribution,
    plot_nucleus_size_analysis,
    plot_nucleus_sizes,
    plot_nucleus_vs_sampled,
    render_page,
    row_numbers,
    write_page,
)

IMAGES = Path(__file__).resolve().parent / "images"
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--window-size=1400,1900",
)  # fmt: skip
THEMES = {"light": 1, "dark": 0}  # as chromium numbers preferred colour schemes


def save_picture(png: bytes, name: str, *, height: int | None = None) -> None:
    """Write a picture into docs/images."""
    path = IMAGES / f"{name}.png"
    path.write_bytes(shrink_picture(png, height=height))
    print(f"{path.relative_to(IMAGES.parent.parent)} {path.stat().st_size:,} bytes")


def shrink_picture(png: bytes, *, height: int | None = None) -> bytes:
    """Return a picture with a palette of 128 colours, which makes it about three times smaller."""
    image = import_extra("PIL.Image", "viz").open(io.BytesIO(png)).convert("RGB")
    if height is not None:
        image = image.crop((0, 0, image.width, height))
    small = io.BytesIO()
    image.quantize(128, dither=0).save(small, "PNG", optimize=True)
    return small.getvalue()


def picture_notebook(output: str) -> None:
    """Run the notebook on an output and keep of what its cells show the pictures alone."""
    nbformat, nbclient = import_extra("nbformat"), import_extra("nbclient")
    path = IMAGES.parent / "explore.ipynb"
    book = nbformat.read(path, as_version=4)
    os.environ["LOGITS"] = str(Path(output).resolve())
    run = {"metadata": {"path": str(path.parent)}}
    shown = nbclient.NotebookClient(book, kernel_name="python3", resources=run).execute()
    for cell in shown.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.execution_count = None
            pictures = [
                o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})
            ]
            small = [shrink_picture(base64.b64decode(png)) for png in pictures]
            cell.outputs = [
                nbformat.v4.new_output(
                    "display_data", {"image/png": base64.b64encode(png).decode()}
                )
                for png in small
            ]
    nbformat.write(book, path)
    print(f"{path.relative_to(IMAGES.parent.parent)} {path.stat().st_size:,} bytes")


def photograph_page(page: str, name: str, *, theme: str, place: str = "") -> None:
    """Write the page as a browser shows it, opened at `place`."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print(f"no chromium here: {name} is left out")
        return
    with tempfile.TemporaryDirectory() as folder:
        write_page(f"{folder}/page.html", page)
        scheme = f"--blink-settings=preferredColorScheme={THEMES[theme]}"
        command = [chromium, *FLAGS, scheme, f"--user-data-dir={folder}/profile"]
        command += [f"--screenshot={folder}/shot.png", f"file://{folder}/page.html{place}"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        # Chromium leaves a page blank that has scrolled, so the window is tall and cut off here.
        save_picture(Path(folder, "shot.png").read_bytes(), name, height=900)


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output")
    parser.add_argument(
        "--conversations", default="2036,1742,1035", help="shown on the page (default: %(default)s)"
    )
    parser.add_argument("--token", type=int, default=2, help="token of the first, shown in full")
    args = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    dataset = load_logit_dataset(args.output)
    text = open_text(dataset)
    numbers = row_numbers(dataset)
    rows = [numbers[int(index)] for index in args.conversations.split(",")]
    sample = get_sample(dataset, rows[0])
    figures = {
        "logit_distribution": plot_logit_distribution(sample, args.token, tokenizer=text.tokenizer),
        "nucleus_vs_sampled": plot_nucleus_vs_sampled(sample),
        "nucleus_sizes": plot_nucleus_sizes(sample),
        "nucleus_size_analysis": plot_nucleus_size_analysis(dataset),
    }
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=100)
        save_picture(buffer.getvalue(), name)
    stats = compute_dataset_stats(dataset, actual_tokens=text.actual_tokens)
    analyses = [analyze_row(dataset, row, text) for row in rows]
    page = render_page(analyses, about=describe_run(dataset), stats=stats)
    photograph_page(page, "page_light", theme="light")
    page = render_page(analyses[:1], about=describe_run(dataset))  # needs no scrolling
    for theme in THEMES:
        photograph_page(page, f"token_{theme}", theme=theme, place=f"#s0-t{args.token}")
    picture_notebook(args.output)


if __name__ == "__main__":
    main()
