"""placeholder"""


def demo() -> None:
    """Run the whole job."""
