"""x"""

from senseflow_utils import fit_flow_scheduler
