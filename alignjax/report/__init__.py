from alignjax.report.page import report
from alignjax.report.picture import picture

__all__ = ['picture', 'report']
