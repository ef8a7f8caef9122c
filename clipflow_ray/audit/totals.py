"""What `run.json` and the report say of a ledger, counted in bounded memory while the ledger is written."""

from collections import Counter, defaultdict
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from clipflow_ray.audit.distribution import Distribution
from clipflow_ray.audit.record import ErrorExample, Judged
from clipflow_ray.columns import LEDGER_SCHEMA
from clipflow_ray.model.calibration import Calibration, Rule
from clipflow_ray.statistics import flagged_rate

MOST_RATES: Final = 200
_EXAMPLES: Final = 3
_NAMES_AT_ONCE: Final = 10_000
_SHOWN: Final = ("row_id", "uri", "member", "p_value", "score", "verdict")


class Rates:
    """Scored and flagged images by name, for the names with most images: at least `MOST_RATES` of them."""

    def __init__(self) -> None:
        self.of: Counter[str] = Counter()
        self.flagged: Counter[str] = Counter()

    def add(self, names: pa.ChunkedArray, flagged: pa.ChunkedArray) -> None:
        """Count scored images by name, and those of them whose value in `flagged`, boolean [N], is true.

        If there are very many names, the images of one name must come in a row.
        """
        table = pa.table({"name": pc.fill_null(names, ""), "hit": flagged.cast(pa.int64())})
        for row in table.group_by("name", use_threads=False).aggregate([("hit", "count"), ("hit", "sum")]).to_pylist():
            self.of[row["name"]] += row["hit_count"]
            self.flagged[row["name"]] += row["hit_sum"]
        if len(self.of) > _NAMES_AT_ONCE:
            last = names[-1].as_py() or ""
            kept = {last, "", *(name for name, _ in self.of.most_common(MOST_RATES))}
            self.of = Counter({name: count for name, count in self.of.items() if name in kept})
            self.flagged = Counter({name: self.flagged[name] for name in self.of})


class Totals:
    """Counts, rates, distributions and examples of the rows of a ledger, which are added in the ledger's order."""

    def __init__(self, rule: Rule, calibration: Calibration, gallery: int) -> None:
        self._rule, self.gallery = rule, gallery
        self.rows, self._capped = 0, 0
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in ("status", "error_code", "verdict")}
        self.groups, self.strata = Rates(), Rates()
        self.errors: dict[str, list[ErrorExample]] = defaultdict(list)
        self.scores = Distribution(calibration)
        nothing = pa.schema([LEDGER_SCHEMA.field(name) for name in _SHOWN]).empty_table()
        self.suspicious, self.unflagged = nothing, nothing

    def add(self, table: pa.Table) -> None:
        """Count rows of the ledger."""
        self.rows += len(table)
        for name, counter in self._counts.items():
            for row in pc.value_counts(table[name].drop_null()).to_pylist():
                counter[row["values"]] += row["counts"]
        if self._rule.prone and self._rule.cap:
            self._capped += _capped(table["verdict_reasons"].drop_null())
        self._add_errors(table)
        ok = table.select([*_SHOWN, "group", "stratum"]).filter(pc.equal(table["status"], "ok"))
        flagged = pc.equal(ok["verdict"], "likely_ai")
        self.groups.add(ok["group"], flagged)
        self.strata.add(ok["stratum"], flagged)
        self.scores.add(ok["score"].to_numpy(), ok["p_value"].to_numpy())
        if self.gallery:
            self.suspicious = self._first(self.suspicious, ok, [("score", "descending"), ("row_id", "ascending")])
            # ids are hashes, so their order is random and the same in every run
            self.unflagged = self._first(self.unflagged, ok.filter(pc.invert(flagged)), [("row_id", "ascending")])

    def judged(self) -> Judged:
        """The totals as `run.json` holds them."""
        counts = self._counts
        return Judged(
            rows=self.rows,
            by_status=dict(sorted(counts["status"].items())),
            by_error_code=dict(sorted(counts["error_code"].items())),
            by_verdict=dict(sorted(counts["verdict"].items())),
            capped=self._capped,
            flagged=flagged_rate(counts["verdict"]["likely_ai"], counts["status"]["ok"], self._rule.alpha),
        )

    def _add_errors(self, table: pa.Table) -> None:
        bad = table.select(["error_code", "error_message", "uri", "member"]).filter(table["error_code"].is_valid())
        for code in pc.unique(bad["error_code"]).to_pylist():
            if left := _EXAMPLES - len(self.errors[code]):
                for row in bad.filter(pc.equal(bad["error_code"], code)).slice(0, left).to_pylist():
                    place = row["uri"] + (f" : {row['member']}" if row["member"] else "")
                    self.errors[code].append(ErrorExample(place=place, message=row["error_message"]))

    def _first(self, best: pa.Table, more: pa.Table, order: Any) -> pa.Table:
        both = pa.concat_tables([best, more.select(_SHOWN)])
        return both.take(pc.select_k_unstable(both, self.gallery, sort_keys=order))


def _capped(reasons: pa.ChunkedArray) -> int:
    """How many of these are reasons of an image whose p-value is at most alpha, and whose stratum is prone.

    The first of the reasons is that of the p-value.
    """
    low = pc.equal(pc.list_element(reasons, 0), "below_alpha")
    return int(pc.sum(pc.and_(low, pc.equal(pc.list_value_length(reasons), 2))).as_py() or 0)
