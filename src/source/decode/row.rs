//! Records that are no text: rows of a table, whose values are there by path.

use super::{Stop, Walker};

/// One row of a table whose columns were bound to the paths of a decoder.
pub trait Row {
    /// Gives `to` all values but those of the slate's elements.
    fn give(&self, to: &mut Walker) -> Result<(), Stop>;

    /// How many elements the slate has; `None` where there is no slate.
    fn elements(&self) -> Option<usize>;

    /// Gives `to` the values of an element of the slate.
    fn give_element(&self, element: usize, to: &mut Walker) -> Result<(), Stop>;

    /// Appends the values that the paths name as a JSON object, members by name. Two rows of equal values have equal texts,
    /// wherever they lie.
    fn append_text(&self, out: &mut Vec<u8>);
}

/// One record, as its log has it.
#[derive(Clone, Copy)]
pub enum Raw<'a> {
    Text(&'a [u8]),
    Row(&'a dyn Row),
}

impl Raw<'_> {
    /// Appends its bytes, or the text of the row.
    pub fn append_to(self, out: &mut Vec<u8>) {
        match self {
            Self::Text(raw) => out.extend_from_slice(raw),
            Self::Row(row) => row.append_text(out),
        }
    }
}
