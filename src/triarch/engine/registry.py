"""All procedures by their verb: how a journal record becomes the procedure that it speaks of."""

from __future__ import annotations

from typing import Any

import msgspec

from triarch.engine.backup_procedures import Export, ImportBackup
from triarch.engine.copies import Copy
from triarch.engine.device_procedures import DEVICE_PROCEDURES
from triarch.engine.files import FILES_PROCEDURES
from triarch.engine.journal import JournalRecord
from triarch.engine.machine_procedures import MACHINE_PROCEDURES
from triarch.engine.network_procedures import NETWORK_PROCEDURES
from triarch.engine.procedure import Procedure
from triarch.engine.profiles import PROFILE_PROCEDURES
from triarch.engine.services import Services
from triarch.engine.set_machine import SetMachineProcedure
from triarch.engine.snapshot_procedures import SNAPSHOT_PROCEDURES
from triarch.engine.template_procedures import TEMPLATE_PROCEDURES
from triarch.errors import Damaged

# Each class has a constructor (services, arguments) and names the struct of its arguments.
_ALL: tuple[Any, ...] = (
    *MACHINE_PROCEDURES,
    *FILES_PROCEDURES,
    SetMachineProcedure,
    *PROFILE_PROCEDURES,
    *TEMPLATE_PROCEDURES,
    *SNAPSHOT_PROCEDURES,
    Copy,
    Export,
    ImportBackup,
    *DEVICE_PROCEDURES,
    *NETWORK_PROCEDURES,
)
PROCEDURES: dict[str, Any] = {procedure.verb: procedure for procedure in _ALL}


def rebuild(services: Services, record: JournalRecord) -> Procedure:
    """The procedure that a journal record speaks of, from its arguments alone. Raises `Damaged`."""
    verb = record.operation.verb
    if verb not in PROCEDURES:
        raise Damaged(f"the journal has operation {record.operation.id} with the unknown verb '{verb}'")
    kind = PROCEDURES[verb]
    procedure: Procedure = kind(services, msgspec.json.decode(record.arguments, type=kind.arguments_type))
    return procedure
