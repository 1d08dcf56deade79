"""`care-train report`: runs as one HTML page, with a browser of their groups."""

from care_train.reporting.page.page import LiveServer, Page, write_page

__all__ = ["LiveServer", "Page", "write_page"]
