"""A smaller image folder made of links into another one: the first images of each class, by file name.

    python -m bench.few_images FROM TO --train 1000 --test 200

For studies on machines without a GPU, where all of CIFAR-10 takes hours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.errors import DataError, refusal
from deploy.options import errors
from worker.datasets import IMAGE_SUFFIXES


def link_few(source: Path, target: Path, counts: dict[str, int]) -> int:
    """Links the first images of every class; returns how many they are.

    Args:
        source: a folder of `train/<class>/*` and `test/<class>/*`.
        target: a folder that is not there yet.
        counts: images of each class, by `train` and `test`.

    Raises:
        DataError: `target` is there, or a class has too few images.
    """
    if target.exists():
        raise DataError(refusal("a folder that is not there yet", "TO", target))
    links: list[tuple[Path, Path]] = []
    for part, count in counts.items():
        classes = (
            sorted(each for each in (source / part).iterdir() if each.is_dir()) if (source / part).is_dir() else []
        )
        if not classes:
            raise DataError(refusal(f"{part}/<class>/* under it", "FROM", source))
        for folder in classes:
            images = sorted(each for each in folder.iterdir() if each.suffix.lower() in IMAGE_SUFFIXES)
            if len(images) < count:
                raise DataError(refusal(f"at least {count} images in each class", "images", len(images), str(folder)))
            links += [(target / part / folder.name / each.name, each.resolve()) for each in images[:count]]
    for link, image in links:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image)
    return len(links)


def main(
    source: Annotated[Path, typer.Argument(metavar="FROM", help="Folder of train/<class>/* and test/<class>/*.")],
    target: Annotated[Path, typer.Argument(metavar="TO", help="Folder to make.")],
    train: Annotated[int, typer.Option(min=1, help="Images of each class.")] = 1000,
    test: Annotated[int, typer.Option(min=1, help="Images of each class.")] = 200,
) -> None:
    """Makes the folder."""
    with errors(as_json=False, process="few_images"):
        typer.echo(f"{link_few(source, target, {'train': train, 'test': test})} images in {target}")


if __name__ == "__main__":
    typer.run(main)
