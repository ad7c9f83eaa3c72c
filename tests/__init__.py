"""The tests mirror hbmeta/; shared pieces are imported as `from tests.cases import ...`."""
