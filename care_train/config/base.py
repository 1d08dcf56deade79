"""How settings are validated: what every section shares."""

STRICT = {"extra": "forbid", "use_attribute_docstrings": True}
"""Unknown keys are errors, docstrings are their descriptions."""


def check(holds: bool, key: str, got: object, wanted: str) -> None:
    """Raise ValueError naming key, got and wanted unless `holds`."""
    if not holds:
        raise ValueError(f"{key}: got {got!r}, wanted {wanted}")


def check_at_least(settings: object, section: str, **least: float) -> None:
    """`check` that numbers of a section are not below these; one that is null has no bound."""
    for key, bound in least.items():
        got = getattr(settings, key)
        check(got is None or got >= bound, f"{section}.{key}", got, f"at least {bound:g}")
