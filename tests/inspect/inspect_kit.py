"""What the cache of the inspect tests holds."""

from __future__ import annotations

EVIL = "</script><img src=x onerror=\"document.title='owned'\"><!--<script>\u2028& \x1b[31m"
CAPTIONS = ["A bird", "A bird", "Ein Häschen im Grünen 🐇", EVIL, "A meadow", "Rain", "A long road", "Snow"]
OUTLIER = 6
