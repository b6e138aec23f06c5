"""What the adversary may do: a norm and an exact radius, written `Linf@8/255` or `L2@0.5`."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator

from robench.errors import UserError

Norm = Literal["Linf", "L2"]
NORMS: tuple[str, ...] = get_args(Norm)

#: How far outside the ball a valid answer may be, relative to max(1, epsilon): rounding of `image + offset` in float32
#: (2^-24 for pixels up to 1) and of the sum of squares in an L2 norm, with a factor of ten to spare.
BALL_TOLERANCE = 1e-6


def exact_fraction(value: Any) -> Fraction:
    """Read "8/255", "0.3", "1" or a number as an exact fraction; a float is read as its shortest decimal text."""
    try:
        return Fraction(str(value).strip())
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{value!r} is no number; write it as 8/255 or 0.3") from None


def fraction_text(value: Fraction) -> str:
    """Write a fraction as a short exact decimal where there is one ("0.3"), else as "8/255"."""
    decimal = f"{float(value):.6g}"
    return decimal if Fraction(decimal) == value else f"{value.numerator}/{value.denominator}"


def epsilon_text(value: Fraction) -> str:
    """Write a radius for readers: as :func:`fraction_text`, but 24/255 and not 8/85."""
    text, levels = fraction_text(value), 255 * value
    return f"{levels.numerator}/255" if "/" in text and levels.denominator == 1 else text


ExactFraction = Annotated[Fraction, PlainValidator(exact_fraction), PlainSerializer(fraction_text, return_type=str)]


class ThreatModel(BaseModel):
    """An Lp ball around each image, intersected with the box [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    norm: Norm
    """Which distance is bounded."""
    epsilon: ExactFraction
    """Radius on the [0, 1] scale of the pixels; exact, because 0.031 and 8/255 are different questions."""

    @classmethod
    def parse(cls, text: str) -> ThreatModel:
        """Read `NORM@EPSILON`; raise UserError that names what is wrong with `text`."""
        norm, at, radius = text.partition("@")
        names = {n.lower(): n for n in NORMS}
        if not at or norm.strip().lower() not in names:
            raise UserError(f"threat model {text!r} is not NORM@EPSILON; write Linf@8/255 or L2@0.5")
        try:
            epsilon = exact_fraction(radius)
        except ValueError as error:
            raise UserError(f"threat model {text!r}: epsilon {error}") from None
        if epsilon <= 0:
            raise UserError(f"threat model {text!r}: epsilon must be positive, such as 8/255")
        if names[norm.strip().lower()] == "Linf" and epsilon > 1:
            raise UserError(f"threat model {text!r}: epsilon is on the [0, 1] scale of pixels; write {radius}/255")
        return cls(norm=names[norm.strip().lower()], epsilon=epsilon)

    @property
    def radius(self) -> float:
        """Return epsilon as a float."""
        return float(self.epsilon)

    @property
    def reach(self) -> float:
        """Return the largest distance, measured in float64, that counts as inside: epsilon up to BALL_TOLERANCE."""
        return self.radius + BALL_TOLERANCE * max(1.0, self.radius)

    def __str__(self) -> str:
        return f"{self.norm}@{epsilon_text(self.epsilon)}"
