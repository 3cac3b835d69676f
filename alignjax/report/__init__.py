from alignjax.report.front import front_png
from alignjax.report.page import report

__all__ = ['front_png', 'report']
