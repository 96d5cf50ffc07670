"""Cost of API calls from list prices in US dollars per million tokens.

Sources: https://docs.claude.com/en/docs/about-claude/pricing and https://openai.com/api/pricing; both providers bill
batches at half price. Anthropic bills writing to its cache at 1.25 times the input price and reading at a tenth;
OpenAI bills no writing.
"""

from dataclasses import dataclass

MILLION = 1_000_000
BATCH_FACTOR = 0.5


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens."""

    input: float
    output: float
    cache_read: float
    cache_write: float


PRICES: dict[str, Price] = {
    "claude-sonnet-4-5": Price(3.0, 15.0, 0.3, 3.75),
    "claude-sonnet-4": Price(3.0, 15.0, 0.3, 3.75),
    "claude-haiku-4-5": Price(1.0, 5.0, 0.1, 1.25),
    "gpt-4o-mini": Price(0.15, 0.6, 0.075, 0.15),
    "gpt-4o": Price(2.5, 10.0, 1.25, 2.5),
    "gpt-4.1": Price(2.0, 8.0, 0.5, 2.0),
    "gpt-4.1-mini": Price(0.4, 1.6, 0.1, 0.4),
}


@dataclass(frozen=True)
class Usage:
    """Tokens of one or many calls; `input` leaves out what the cache served or took."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.input + other.input,
            self.output + other.output,
            self.cache_read + other.cache_read,
            self.cache_write + other.cache_write,
        )


def find_price(model: str) -> Price | None:
    """The price of a model, dated names included; None for an unknown one."""
    names = [name for name in PRICES if model == name or model.startswith((f"{name}-", f"{name}@"))]
    return PRICES[max(names, key=len)] if names else None


def cost_usd(usage: Usage, price: Price, is_batch: bool = False) -> float:
    """Dollars that a usage costs."""
    dollars = (
        usage.input * price.input
        + usage.output * price.output
        + usage.cache_read * price.cache_read
        + usage.cache_write * price.cache_write
    ) / MILLION
    return dollars * (BATCH_FACTOR if is_batch else 1.0)
