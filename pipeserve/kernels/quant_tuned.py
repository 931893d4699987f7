"""Measured choices of a card: which way multiplies each planar matrix fastest, by rows.

Read from a JSON file per card when a backend is made, whose parts are: card, its name as torch has
it; note; products, each of a type, rows, columns, few_rows and batch. The last two map most tokens
to a way as quant_ways writes it. `same_as` in place of products names another card's file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from pipeserve.kernels.quant_layout import LAYOUTS, UNIT
from pipeserve.kernels.quant_mma_tiling import STEP_COLUMNS
from pipeserve.kernels.quant_ways import (
    BatchWay,
    Dequantise,
    FewRowsWay,
    Gemv,
    Imma,
    Mma,
    parse_batch_way,
    parse_few_rows_way,
)
from pipeserve.kernels.tuned_files import TunedTableError, find_table

ProductKey = tuple[str, int, int]
"""Type, outputs and inputs of a matrix."""
Way = TypeVar("Way", bound=FewRowsWay | BatchWay)


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedProduct:
    """The ways of one matrix by the most tokens that each is for, ascending."""

    few_rows: Mapping[int, FewRowsWay]
    batch: Mapping[int, BatchWay]


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedTable:
    """A card's; empty where nothing was measured."""

    card: str = ""
    note: str = ""
    products: Mapping[ProductKey, TunedProduct] = field(
        default_factory=lambda: MappingProxyType({})
    )

    def few_rows_way(self, key: ProductKey, num_tokens: int) -> FewRowsWay | None:
        """None: not measured."""
        product = self.products.get(key)
        return None if product is None else _first_from(product.few_rows, num_tokens)

    @property
    def most_byte_rows(self) -> int:
        """Up to so many rows some matrix is multiplied by bytes on tensor cores."""
        return max(
            (
                most
                for product in self.products.values()
                for most, way in product.few_rows.items()
                if isinstance(way, Imma)
            ),
            default=0,
        )

    def batch_way(self, key: ProductKey, num_tokens: int) -> BatchWay | None:
        """None: not measured."""
        product = self.products.get(key)
        return None if product is None else _first_from(product.batch, num_tokens)


def _first_from(ways: Mapping[int, Way], num_tokens: int) -> Way | None:
    return next((way for most, way in ways.items() if num_tokens <= most), None)


def tuned_table(card: str, own_folder: Path | None = None) -> TunedTable:
    """The card's choices, or an empty table. Raises TunedTableError."""
    path = find_table(card, own_folder)
    return TunedTable(card=card) if path is None else read_table(path, card)


def read_table(path: Path, card: str) -> TunedTable:
    """Of a file that must be this card's. Raises TunedTableError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["card"] != card:
            raise ValueError(f"it is for {content['card']!r}, not for {card!r}")
        note = str(content.get("note", ""))
        if "same_as" in content:
            other = json.loads((path.parent / str(content["same_as"])).read_text(encoding="utf-8"))
            content = other | {"card": card}
        products = dict(map(_parse_product, content["products"]))
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as problem:
        reason = f"{problem} is missing" if isinstance(problem, KeyError) else str(problem)
        raise TunedTableError(
            f"{path}: these tuned kernel choices cannot be used: {reason}; delete the file, or "
            "write it anew with pipeserve bench kernels --tune"
        ) from None
    return TunedTable(card=card, note=note, products=MappingProxyType(products))


def _parse_product(entry: Mapping[str, Any]) -> tuple[ProductKey, TunedProduct]:
    type_name = entry["type"]
    if type_name not in LAYOUTS:
        raise ValueError(f"type {type_name!r} is none of {', '.join(LAYOUTS)}")
    few_rows = {
        most: parse_few_rows_way(text) for most, text in _by_tokens(entry["few_rows"]).items()
    }
    batch = {
        most: parse_batch_way(text, type_name) for most, text in _by_tokens(entry["batch"]).items()
    }
    product = TunedProduct(few_rows=MappingProxyType(few_rows), batch=MappingProxyType(batch))
    num_columns = int(entry["columns"])
    for way in (*few_rows.values(), *batch.values()):
        step = STEP_COLUMNS if isinstance(way, Mma | Imma) else UNIT
        if num_columns % step and not isinstance(way, Dequantise | Gemv):
            raise ValueError(f"{str(way)!r} takes multiples of {step} columns, not {num_columns}")
    return (type_name, int(entry["rows"]), num_columns), product


def _by_tokens(ways: Mapping[str, str]) -> dict[int, str]:
    return dict(sorted((int(most), text) for most, text in ways.items()))


def as_json(table: TunedTable) -> str:
    """What read_table reads, a line per matrix."""
    lines = []
    for (type_name, num_rows, num_columns), product in table.products.items():
        ways = {
            "few_rows": {str(most): str(way) for most, way in product.few_rows.items()},
            "batch": {str(most): str(way) for most, way in product.batch.items()},
        }
        entry = {"type": type_name, "rows": num_rows, "columns": num_columns, **ways}
        lines.append("  " + json.dumps(entry))
    head = f'{{"card": {json.dumps(table.card)},\n "note": {json.dumps(table.note)},\n'
    return head + ' "products": [\n' + ",\n".join(lines) + "\n]}\n"
