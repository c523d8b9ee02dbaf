"""Pictures of several users side by side, with what they are."""

from comfy_api.latest import io

from .sockets import CATEGORY, searched

ROWS = 6


class LabelledSheet(io.ComfyNode):
    """Batches of pictures -> one IMAGE with labels."""

    @classmethod
    def define_schema(cls):
        rows = [
            io.Image.Input(
                f"row_{number}",
                optional=number > 1,
                tooltip="The pictures of the first row, as a batch." if number == 1 else "Another row, or none.",
            )
            for number in range(1, ROWS + 1)
        ]

        def labels(name, what):
            return io.String.Input(
                name, multiline=True, default="", optional=True, tooltip=f"What {what}, a line each. Optional."
            )

        return io.Schema(
            node_id="PrefGen_LabelledSheet",
            display_name="Labelled Sheet",
            category=CATEGORY,
            description="Puts pictures into one sheet: a row for each batch, with labels for rows and columns, such as "
            "tastes and strengths.",
            **searched("sheet", "grid", "compare", "label", "contact sheet", "xy plot"),
            inputs=[*rows, labels("row_labels", "the rows are"), labels("column_labels", "the columns are")],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The sheet, as one picture.")],
        )

    @classmethod
    def execute(cls, row_1, row_labels="", column_labels="", **others) -> io.NodeOutput:
        from ..prefgen.sheet import labelled_sheet, lines

        rows = [row_1, *(others.get(f"row_{number}") for number in range(2, ROWS + 1))]
        return io.NodeOutput(labelled_sheet(rows, lines(row_labels), lines(column_labels)))
