//! Short pieces as numbers. Nearly all pieces of a text have at most 15 bytes; then bytes and size fit one u128,
//! and a table needs no pointers, no comparison of strings and no memory per piece.

/// The bytes of a piece and, in the highest byte, its size. Never 0, because no piece is empty.
pub(crate) type Key = u128;

/// Pieces of more bytes have no key.
pub(crate) const SHORT: usize = 15;

/// The key of text[start..end], or None if that is too long.
#[inline(always)]
pub(crate) fn key(text: &[u8], start: usize, end: usize) -> Option<Key> {
    let size = end - start;
    if size > SHORT {
        return None;
    }
    let sixteen = match text.get(start..).and_then(|rest| rest.first_chunk::<16>()) {
        Some(sixteen) => u128::from_le_bytes(*sixteen),
        None => near_the_end(&text[start..end]),
    };
    let mask = (1 << (8 * size)) - 1;
    Some(sixteen & mask | (size as u128) << 120)
}

#[cold]
fn near_the_end(piece: &[u8]) -> u128 {
    let mut sixteen = [0; 16];
    sixteen[..piece.len()].copy_from_slice(piece);
    u128::from_le_bytes(sixteen)
}

/// A piece found in a text.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Found {
    /// Its key, or 0 if it is too long to have one.
    pub(crate) key: Key,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// Pieces that wait for being looked up. The looks at a large table are then close together, so that the
/// processor fetches its memory for many of them at once.
#[derive(Debug)]
pub(crate) struct Pieces {
    pieces: [Found; 64],
    len: usize,
}

impl Default for Pieces {
    fn default() -> Self {
        Pieces { pieces: [Found::default(); 64], len: 0 }
    }
}

impl Pieces {
    /// Adds text[start..end], and hands all to `take` when there are many.
    #[inline(always)]
    pub(crate) fn push(&mut self, text: &[u8], start: usize, end: usize, take: impl FnOnce(&[Found])) {
        let key = key(text, start, end).unwrap_or(0);
        self.pieces[self.len] = Found { key, start, end };
        self.len += 1;
        if self.len == self.pieces.len() {
            self.flush(take);
        }
    }

    /// Hands over what is left.
    pub(crate) fn flush(&mut self, take: impl FnOnce(&[Found])) {
        take(&self.pieces[..self.len]);
        self.len = 0;
    }
}

/// A hash whose highest bits are the best ones.
#[inline(always)]
pub(crate) fn hash(key: Key) -> u64 {
    let (low, high) = (key as u64, (key >> 64) as u64);
    (low ^ high.wrapping_mul(0xd6e8_feb8_6659_fd93)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_its_piece() {
        let text = b"abcdefghijklmnopqrstuvwxyz\0\0";
        for start in 0..text.len() {
            for end in start + 1..=text.len() {
                let found = key(text, start, end);
                assert_eq!(found.is_some(), end - start <= 15);
                if let Some(key) = found {
                    let piece = key.to_le_bytes();
                    assert_eq!(piece[..usize::from(piece[SHORT])], text[start..end]);
                }
            }
        }
        assert_ne!(key(b"\0", 0, 1), key(b"\0\0", 0, 2));
    }
}
