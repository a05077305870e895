"""Images with a text file of the same name beside each: `a/fox.jpg` and `a/fox.txt`.

The lines of the text file are the image's captions.
"""

from __future__ import annotations

import os
from pathlib import Path

from mixflow_fast.data.decoding import IMAGE_SUFFIXES
from mixflow_fast.data.preparation.captioned.listing import (
    BadItem,
    FolderFiles,
    Item,
    Listing,
    Refused,
    decode_text,
    lines_of,
    unread_image,
)

TEXT_SUFFIX = ".txt"


def list_text_files(root: Path, names: list[str]) -> Listing:
    """The images of a folder and those below it.

    Args:
        root: the folder.
        names: of all files in it and below, sorted.
    """
    listing = Listing(root, "text files", FolderFiles(root))
    files: dict[str, list[str]] = {}  # by what precedes the suffix
    for name in names:
        files.setdefault(os.path.splitext(name)[0], []).append(name)
    for stem, group in files.items():
        images = [name for name in group if name.lower().endswith(IMAGE_SUFFIXES)]
        texts = [name for name in group if name.lower().endswith(TEXT_SUFFIX)]
        if not images and not texts:
            listing.passed_over.update(os.path.splitext(name)[1].lower() for name in group)
        elif not images:
            detail = unread_image(group) or f"no {os.path.basename(stem)}.png, .jpg beside it"
            listing.bad += [BadItem(name, "caption without an image", detail) for name in texts]
        elif not texts:
            detail = f"no {os.path.basename(stem)}{TEXT_SUFFIX} beside it"
            listing.bad += [BadItem(name, "image without a caption", detail) for name in images]
        elif len(images) > 1 or len(texts) > 1:
            detail = f"{', '.join(images + texts)}: keep one image and one text file"
            listing.bad.append(BadItem(images[-1], "second image of one name", detail))
        else:
            _add(listing, images[0], texts[0])
    listing.items.sort(key=lambda item: item.name)
    return listing


def _add(listing: Listing, image: str, text: str) -> None:
    try:
        captions = lines_of(decode_text((listing.root / text).read_bytes()))
    except Refused as error:
        listing.bad.append(error.item(text))
    else:
        listing.items.append(Item(image, captions))
