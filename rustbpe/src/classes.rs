//! What split patterns ask of a character: its class, as one bit. Taken from the regex engine's own Unicode
//! tables, so that a scanner and a regex never differ in what a letter is.

use std::sync::OnceLock;

use regex_syntax::hir::{Class, HirKind};

/// `\p{Lu}` and `\p{Lt}`: capital letters.
pub(crate) const UPPER: u8 = 1;
/// `\p{Ll}`: small letters.
pub(crate) const LOWER: u8 = 2;
/// `\p{Lm}` and `\p{Lo}`: letters that are neither, or both.
pub(crate) const CASELESS: u8 = 4;
/// `\p{L}`
pub(crate) const LETTER: u8 = UPPER | LOWER | CASELESS;
/// `\p{M}`: accents and the like, which follow the character they belong to.
pub(crate) const MARK: u8 = 8;
/// `\p{N}`
pub(crate) const NUMBER: u8 = 16;
/// `\s` but for line breaks.
pub(crate) const BLANK: u8 = 32;
/// `[\r\n]`
pub(crate) const BREAK: u8 = 64;
/// `\s`
pub(crate) const SPACE: u8 = BLANK | BREAK;
/// Everything else: punctuation, symbols, controls, what is not assigned.
pub(crate) const OTHER: u8 = 128;

const BLOCK: usize = 256;

/// The class of every character, in two steps: its block of 256, and its place there. Most blocks are alike.
#[derive(Debug)]
pub(crate) struct Classes {
    block_of: Vec<u8>,
    blocks: Vec<[u8; BLOCK]>,
    ascii: [u8; 128],
}

impl Classes {
    /// The table, made at first use (a few milliseconds).
    pub(crate) fn get() -> &'static Classes {
        static CLASSES: OnceLock<Classes> = OnceLock::new();
        CLASSES.get_or_init(Classes::new)
    }

    fn new() -> Self {
        let mut of = vec![OTHER; 0x11_0000];
        let properties = [
            (r"[\p{Lu}\p{Lt}]", UPPER),
            (r"\p{Ll}", LOWER),
            (r"[\p{Lm}\p{Lo}]", CASELESS),
            (r"\p{M}", MARK),
            (r"\p{N}", NUMBER),
            (r"\s", BLANK),
            (r"[\r\n]", BREAK),
        ];
        for (property, class) in properties {
            let parsed = regex_syntax::parse(property).map(|hir| hir.into_kind());
            if let Ok(HirKind::Class(Class::Unicode(set))) = parsed {
                for range in set.iter() {
                    of[range.start() as usize..=range.end() as usize].fill(class);
                }
            }
        }
        let mut ascii = [OTHER; 128];
        ascii.copy_from_slice(&of[..128]);
        let mut blocks: Vec<[u8; BLOCK]> = Vec::new();
        let mut block_of = Vec::with_capacity(of.len() / BLOCK);
        for block in of.chunks_exact(BLOCK) {
            let same = blocks.iter().position(|known| known == block);
            block_of.push(same.unwrap_or(blocks.len()) as u8);
            if same.is_none() {
                let mut new = [OTHER; BLOCK];
                new.copy_from_slice(block);
                blocks.push(new);
            }
        }
        assert!(blocks.len() <= 256, "block numbers must fit a byte");
        Classes { block_of, blocks, ascii }
    }

    /// The class of the character that begins at `at` of UTF-8, and where the next one begins. At the end of the
    /// text the class is 0, which is none.
    #[inline(always)]
    pub(crate) fn at(&self, text: &[u8], at: usize) -> (u8, usize) {
        match text.get(at) {
            None => (0, at),
            Some(&byte) if byte < 128 => (self.ascii[byte as usize], at + 1),
            Some(_) => self.beyond_ascii(text, at),
        }
    }

    #[inline]
    fn beyond_ascii(&self, text: &[u8], at: usize) -> (u8, usize) {
        let low = |i: usize| u32::from(text[at + i] & 0x3f);
        let first = u32::from(text[at]);
        let (code, size) = match first {
            0..0xe0 => ((first & 0x1f) << 6 | low(1), 2),
            0xe0..0xf0 => ((first & 0xf) << 12 | low(1) << 6 | low(2), 3),
            _ => ((first & 7) << 18 | low(1) << 12 | low(2) << 6 | low(3), 4),
        };
        let block = self.block_of[code as usize / BLOCK];
        (self.blocks[block as usize][code as usize % BLOCK], at + size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_those_of_the_regex_engine() {
        let classes = Classes::get();
        let matching = |pattern: &str| fancy_regex::Regex::new(pattern).unwrap();
        let patterns = [
            (LETTER, r"\p{L}"),
            (UPPER, r"[\p{Lu}\p{Lt}]"),
            (LOWER, r"\p{Ll}"),
            (MARK, r"\p{M}"),
            (NUMBER, r"\p{N}"),
            (SPACE, r"\s"),
            (BREAK, r"[\r\n]"),
            (OTHER | MARK, r"[^\s\p{L}\p{N}]"),
        ]
        .map(|(class, pattern)| (class, matching(pattern)));
        for character in (0..=0x10_ffff).filter_map(char::from_u32) {
            let text = character.to_string();
            let (class, end) = classes.at(text.as_bytes(), 0);
            assert_eq!((class.count_ones(), end), (1, text.len()));
            for (bits, regex) in &patterns {
                assert_eq!(class & bits != 0, regex.is_match(&text).unwrap(), "{character:?}");
            }
        }
        assert_eq!(classes.at(b"ab", 2), (0, 2));
    }
}
