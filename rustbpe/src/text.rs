//! What is counted and encoded: texts that are known to be UTF-8, and bytes that are yet to be checked.

use crate::Error;

/// A text of a batch. Checked by the thread that works on it.
pub trait Text: Sync {
    /// The text, or None where a value is missing (a null of Arrow).
    fn text(&self) -> Result<Option<&str>, Error>;

    /// Its size in bytes, for sharing the work.
    fn size(&self) -> usize;
}

impl<T: AsRef<str> + Sync> Text for T {
    fn text(&self) -> Result<Option<&str>, Error> {
        Ok(Some(self.as_ref()))
    }

    fn size(&self) -> usize {
        self.as_ref().len()
    }
}

/// Bytes that must be UTF-8, or a missing value.
#[derive(Debug, Clone, Copy)]
pub struct ByteText<'t>(pub Option<&'t [u8]>);

impl Text for ByteText<'_> {
    fn text(&self) -> Result<Option<&str>, Error> {
        match self.0.map(std::str::from_utf8) {
            None => Ok(None),
            Some(Ok(text)) => Ok(Some(text)),
            Some(Err(error)) => Err(Error::Utf8 { text: 0, byte: error.valid_up_to() }),
        }
    }

    fn size(&self) -> usize {
        self.0.map_or(0, <[u8]>::len)
    }
}
