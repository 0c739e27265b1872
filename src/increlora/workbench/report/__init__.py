"""What a run did, as one HTML file or as figures. Reads run folders, nothing else; needs the extra `report`."""

from .reading import Run, read_runs
from .writing import save_figures, write_report

__all__ = ["Run", "read_runs", "save_figures", "write_report"]
