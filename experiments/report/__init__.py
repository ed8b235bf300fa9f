"""The report: every run below some folders compared on one page.

Other packages use what lies inside: `comparison` (numbers), `page` (what pages are made of) and
`sections` (what the report says).
"""

__all__: list[str] = []
